"""A teacher's outputs, cached on disk: later passes and runs read them without the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..data.rows import Packed
from ..errors import RegraftError
from ..io.identity import identify_model
from ..io.units import parse_number
from .fsdp_forward import run_in_forward
from .hooks import LayerRecord, record_layers, run_decoder
from .kl import head_kl, top_k_kl, top_k_log_probs
from .objectives import last_hidden
from .row_store import Row, RowStore

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TeacherCacheUse(TypedDict):
    """What a cache did in a run. Counts are rows unless said otherwise."""

    read: int  # found in the cache
    computed: int  # computed by the teacher
    kept: int  # of the computed ones, those written to disk
    refused: int  # of the computed ones, those for which there was no room
    damaged: int  # damaged files that were removed
    bytes: int  # limit of the cache on disk


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Where and how teacher outputs are cached.

    RegraftError when the kind is unknown or the size is not positive.

    Attributes:
        folder: folder of the cache; runs may share it.
        size: bytes of disk for everything in `folder`. Rows that no longer fit are recomputed
            each time.
        kind: what is stored of each row. `hidden`: the last hidden states, from which the
            teacher's head gives the exact distribution. `hidden:bfloat16`: the same, rounded.
            `topk:K`: the K most likely tokens and the probability of the rest. For stage `align`,
            inputs and outputs of the layers, in the precision of `hidden`.
    """

    folder: Path
    size: int
    kind: str = "hidden"

    def __post_init__(self) -> None:
        word, _, option = self.kind.partition(":")
        valid_hidden = word == "hidden" and option in ("", *PRECISIONS)
        valid_top_k = word == "topk" and option.isdigit() and int(option) > 0
        if not (valid_hidden or valid_top_k):
            raise RegraftError(
                f"teacher outputs are kept as '{self.kind}': give hidden, hidden:bfloat16 or topk:K"
            )
        if self.size < 1:
            raise RegraftError(f"{self.size} bytes for teacher outputs: give a size such as 4GB")

    @classmethod
    def parse(cls, folder: str, size: str, kind: str) -> TeacherCacheConfig:
        """Build from command-line words; RegraftError when one of them is wrong.

        Args:
            folder: folder of the cache.
            size: a number of bytes with a unit, such as 500MB or 4GB (powers of 1000).
            kind: see `TeacherCacheConfig`.
        """
        return cls(Path(folder), parse_number(size, "the size of teacher outputs"), kind)

    @property
    def top_k(self) -> int:
        """How many tokens are stored for each position; 0 for hidden states."""
        word, _, option = self.kind.partition(":")
        return int(option) if word == "topk" else 0

    @property
    def dtype(self) -> torch.dtype:
        """In which hidden states, and inputs and outputs of layers, are stored."""
        if self.top_k:
            return torch.float32
        return PRECISIONS[self.kind.partition(":")[2] or "float32"]


class CachedTeacher:
    """A teacher behind a cache, loaded when a row is first missing.

    A row's key is made of its token ids and positions, and a store's name of the teacher's
    identity, so that outputs are never taken for those of another row or teacher.

    RegraftError when the teacher is no decoder.

    Attributes:
        checkpoint: the teacher's checkpoint.
        keeping: how its outputs are cached.
        load: loads the teacher.
        identity: of the teacher's files.
        name: path of the teacher.
        config: its transformers config.
        loaded: the model, None until it is needed.
        projection: its head alone, None until it is needed.
        stores: the stores of rows by what they hold.
        read: how many rows were found in the cache.
        computed: how many rows the teacher computed.
    """

    def __init__(
        self,
        teacher: str,
        keeping: TeacherCacheConfig,
        load: Callable[[str], PreTrainedModel] = modeling.load,
    ):
        modeling.check_decoder(teacher)
        self.checkpoint, self.keeping, self.load = Checkpoint.open(teacher), keeping, load
        self.identity = distributed.on_rank0(lambda: identify_model(teacher))
        self.name, self.config = teacher, modeling.build_meta_model(self.checkpoint).config
        self.loaded: PreTrainedModel | None = None
        self.projection: nn.Linear | None = None
        self.stores: dict[str, RowStore] = {}
        self.read = self.computed = 0

    @property
    def model(self) -> PreTrainedModel:
        """The teacher itself."""
        if self.loaded is None:
            self.loaded = self.load(self.name)
        return self.loaded

    @property
    def slots(self) -> list[nn.Module]:
        """The attention modules of the teacher itself."""
        return modeling.slots(self.model, self.checkpoint)

    @property
    def head(self) -> nn.Linear:
        """The teacher's head. While the teacher is not loaded, only the head is in memory."""
        if self.loaded is not None:
            return self.loaded.get_output_embeddings()
        if self.projection is None:
            self.projection = load_head(self.checkpoint)
        return self.projection

    def compute_kl(self, h: Tensor, head: nn.Linear, rows: Packed, fast: bool) -> Tensor:
        """KL(teacher || student) per token, a scalar.

        Args:
            h: the student's last hidden states (batch, time, hidden), float32.
            head: the student's head.
            rows: the rows that the student has read.
            fast: compute in bfloat16.
        """
        found = self.fetch_rows(rows, fast, self.keeping.kind, self.compute_outputs)
        if not self.keeping.top_k:
            target = stack_rows(found, "hidden", h.device)
            return head_kl(h, head, target, self.head.to(h.device), fast)
        names, logs = (stack_rows(found, name, h.device) for name in ("names", "logs"))
        return top_k_kl(h, head, names.long(), logs.float(), fast)

    def compute_outputs(self, rows: Packed, fast: bool) -> Row:
        """Run the teacher on some rows; its outputs as they are stored."""
        with torch.no_grad():
            hidden = run_in_forward(self.model, lambda: last_hidden(self.model, rows, fast))
            if not self.keeping.top_k:
                return {"hidden": hidden.to(self.keeping.dtype)}  # (rows, time, hidden)

            head, batch = self.model.get_output_embeddings(), hidden.shape[:2]
            names, logs = top_k_log_probs(hidden.flatten(0, 1), head, self.keeping.top_k)
            # names: (rows, time, K) token ids
            # logs: (rows, time, K + 1) log-probabilities, the last of all other tokens together
            return {"names": names.unflatten(0, batch), "logs": logs.unflatten(0, batch)}

    def read_layer_records(
        self, rows: Packed, layers: Sequence[int], fast: bool
    ) -> Iterator[tuple[int, LayerRecord]]:
        """(layer, inputs and outputs of its attention) of these layers."""

        def compute(some: Packed, fast: bool) -> Row:
            return self.compute_layer_outputs(some, layers, fast)

        found = self.fetch_rows(rows, fast, self.layerwise_kind(layers), compute)
        for layer in layers:

            def stack(name: str, layer: int = layer) -> Tensor:
                return stack_rows(found, f"{layer}.{name}", rows.device)

            # Only models with rotary positions have the tables.
            rotary = (stack("cos"), stack("sin")) if f"{layer}.cos" in found[0] else None
            yield layer, LayerRecord(stack("inputs").float(), stack("outputs").float(), rotary)

    def layerwise_kind(self, layers: Sequence[int]) -> str:
        """The kind under which the inputs and outputs of these layers are stored."""
        precision = str(self.keeping.dtype).removeprefix("torch.")
        return f"layers {','.join(map(str, layers))}:{precision}"

    def compute_layer_outputs(self, rows: Packed, layers: Sequence[int], fast: bool) -> Row:
        """Run the teacher on some rows; its layers' inputs and outputs as they are stored."""
        outputs: Row = {}

        def keep_record(layer: int, record: LayerRecord) -> None:
            outputs[f"{layer}.inputs"] = record.inputs.to(self.keeping.dtype)
            outputs[f"{layer}.outputs"] = record.outputs.to(self.keeping.dtype)
            for name, table in zip(("cos", "sin"), record.rotary or (), strict=False):
                # A table may be shared by all rows, (1, time, dim): every row gets its own.
                outputs[f"{layer}.{name}"] = table.expand(len(rows), *table.shape[1:])

        def run() -> None:
            run_decoder(self.model, rows.input_ids, rows.position_ids)

        with (
            record_layers(self.slots, list(layers), keep_record),
            torch.autocast(rows.device.type, torch.bfloat16, enabled=fast),
        ):
            run_in_forward(self.model, run)
        return outputs

    def fetch_rows(
        self, rows: Packed, fast: bool, kind: str, compute: Callable[[Packed, bool], Row]
    ) -> list[Row]:
        """The stored outputs of every row; missing ones are computed and stored.

        Args:
            rows: the rows of text.
            fast: compute in bfloat16.
            kind: what is stored, which selects the store.
            compute: (some rows, fast) -> outputs of these rows, stacked.
        """
        store, keys = self.row_store(kind, fast), row_keys(rows)
        found = [store.get(key) for key in keys]
        missing = self.find_rows_to_compute([row is None for row in found])

        for key, row in zip(keys, found, strict=True):
            # A damaged file is removed with all its rows. Those read before that are stored again.
            if row is not None and key not in store:
                store.add(key, row)

        self.read += len(keys) - len(missing)
        self.computed += len(missing)
        if missing:
            outputs = compute(rows[missing], fast)
            for position, number in enumerate(missing):
                row = {name: value[position] for name, value in outputs.items()}
                found[number] = row
                store.add(keys[number], row)
        return [row for row in found if row is not None]

    def find_rows_to_compute(self, missing: list[bool]) -> list[int]:
        """Numbers of the rows that the teacher runs on, given which of them are missing.

        Under torchrun all processes run the teacher on all their rows when any of them misses one:
        the teacher may be sharded over them, and then each of them takes part in a forward pass.
        """
        if distributed.world_size() > 1:
            return list(range(len(missing))) if any(distributed.all_gather(any(missing))) else []
        return [number for number, absent in enumerate(missing) if absent]

    def cost_key(self, rows: Packed, fast: bool, layers: Sequence[int] | None) -> str:
        """What the teacher's share of a step's FLOPs depends on: how many rows it runs on.

        Args:
            rows: the rows of the step.
            fast: compute in bfloat16.
            layers: the layers whose inputs and outputs are needed; None for the last outputs.
        """
        kind = self.keeping.kind if layers is None else self.layerwise_kind(layers)
        store = self.row_store(kind, fast)
        missing = self.find_rows_to_compute([key not in store for key in row_keys(rows)])
        return f"teacher on {len(missing)}"

    def row_store(self, kind: str, fast: bool) -> RowStore:
        """The store for outputs of one kind, computed in bfloat16 if `fast`, else float32."""
        name = f"{kind} {'bfloat16' if fast else 'float32'}"
        if name not in self.stores:
            facts = {
                "teacher": str(self.checkpoint.origin.resolve()),
                "kept": kind,
                "fast": fast,
                "identity": self.identity,
                "versions": lineage.versions(),  # another release of torch may round differently
            }
            key = json.dumps([self.identity, facts["versions"], name])
            digest = hashlib.sha256(key.encode()).hexdigest()[:24]
            self.stores[name] = RowStore(self.keeping.folder, digest, self.keeping.size, facts)
        return self.stores[name]

    def flush(self) -> TeacherCacheUse:
        """Write the rows that are still in memory and report what the cache did."""
        stores = self.stores.values()
        for store in stores:
            store.flush()
        return {
            "read": self.read,
            "computed": self.computed,
            "kept": sum(store.kept for store in stores),
            "refused": sum(store.refused for store in stores),
            "damaged": sum(store.damaged for store in stores),
            "bytes": self.keeping.size,
        }


Teacher: TypeAlias = PreTrainedModel | CachedTeacher


def load_head(checkpoint: Checkpoint) -> nn.Linear:
    """A decoder's head in float32, read from its checkpoint without the rest of the model."""
    tensors = checkpoint.tensors
    # A model with tied embeddings stores no head of its own.
    weight = tensors.get(("head.weight", None), tensors["embed.weight", None]).read().float()
    bias = tensors.get(("head.bias", None))

    # On the meta device first: no memory is filled with an initialization that is not used.
    vocabulary, hidden = weight.shape
    head = nn.Linear(hidden, vocabulary, bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.read().float(), requires_grad=False)
    return head


def row_keys(rows: Packed) -> list[str]:
    """A key for every row: a hash of its token ids and positions."""
    both = torch.stack((rows.input_ids, rows.position_ids), 1).to("cpu", torch.int64).contiguous()
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in both]


def stack_rows(rows: list[Row], name: str, device: torch.device) -> Tensor:
    """One tensor of all rows, (rows, ...); floating-point values in float32."""
    value = torch.stack([row[name] for row in rows]).to(device)
    return value.float() if value.is_floating_point() else value
