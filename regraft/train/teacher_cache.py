"""What a teacher says about a row, kept on disk: computed once, read by later passes and runs without the teacher."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..data.packing import Packed
from ..errors import RegraftError
from .fsdp_forward import run_in_forward
from .hooks import LayerRecord, record_layers, run_decoder
from .kl import head_kl, top_k_kl, top_k_log_probs
from .objectives import last_hidden
from .row_store import Row, RowStore

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Where and how teacher outputs are kept.

    `size`: bytes of disk that everything in `folder` may take; what no longer fits is computed anew each time. `kind`:
    `hidden`, the last hidden states, whose full distribution the teacher's head alone gives back (exact), or
    `hidden:bfloat16`; `topk:K`, the K likeliest tokens and the mass of the rest. Layers' inputs and outputs, for
    `align`, are kept in the precision of `hidden`.
    """

    folder: Path
    size: int
    kind: str = "hidden"

    def __post_init__(self) -> None:
        word, _, rest = self.kind.partition(":")
        fits = (
            rest in ("", *PRECISIONS)
            if word == "hidden"
            else word == "topk" and rest.isdigit() and int(rest) > 0
        )
        if not fits:
            raise RegraftError(
                f"teacher outputs are kept as '{self.kind}': give hidden, hidden:bfloat16 or topk:K"
            )
        if self.size < 1:
            raise RegraftError(f"{self.size} bytes for teacher outputs: give a size such as 4GB")

    @classmethod
    def parse(cls, folder: str, size: str, kind: str) -> TeacherCacheConfig:
        """From words, the size such as 500MB or 4GB. RegraftError when one of them is wrong."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", size.strip().upper())
        if not found:
            raise RegraftError(
                f"teacher outputs may take '{size}': give a size such as 500MB or 4GB"
            )
        return cls(
            Path(folder), int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")), kind
        )

    @property
    def top_k(self) -> int:
        """How many tokens are named for each position, 0 for all through the head."""
        word, _, rest = self.kind.partition(":")
        return int(rest) if word == "topk" else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept as hidden states."""
        return (
            PRECISIONS[self.kind.partition(":")[2] or "float32"]
            if not self.top_k
            else torch.float32
        )


class CachedTeacher:
    """A teacher behind a cache. `model` is loaded when a row is first missing.

    Rows are known by their token ids and positions, the teacher by the hash of its files, so that neither is mistaken
    for another. Under torchrun all processes run the teacher on a step's rows when one of them misses any: it may be
    sharded over them. RegraftError when the teacher is no decoder.
    """

    def __init__(
        self,
        teacher: str,
        keeping: TeacherCacheConfig,
        load: Callable[[str], PreTrainedModel] = modeling.load,
    ):
        modeling.check_decoder(teacher)
        self.checkpoint, self.keeping, self.load = Checkpoint.open(teacher), keeping, load
        self.name, self.config = teacher, modeling.build_meta_model(self.checkpoint).config
        self.loaded: PreTrainedModel | None = None
        self.projection: nn.Linear | None = None
        self.shelves: dict[str, RowStore] = {}
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
        """The teacher's head, with nothing else of it in memory unless it runs."""
        if self.loaded is not None:
            return self.loaded.get_output_embeddings()
        if self.projection is None:
            tensors = self.checkpoint.tensors
            weight = (
                tensors.get(("head.weight", None), tensors["embed.weight", None]).read().float()
            )
            bias = tensors.get(("head.bias", None))
            self.projection = nn.Linear(
                weight.shape[1], weight.shape[0], bias is not None, device="meta"
            )
            self.projection.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                self.projection.bias = nn.Parameter(bias.read().float(), requires_grad=False)
        return self.projection

    def compute_kl(self, h: Tensor, head: nn.Linear, rows: Packed, fast: bool) -> Tensor:
        """KL(teacher || student) per token of the student's last hidden states h (batch, time, hidden) float32."""
        found = self.fetch_rows(rows, fast, self.keeping.kind, self.compute_outputs)
        if not self.keeping.top_k:
            return head_kl(
                h, head, stack_rows(found, "hidden", h.device), self.head.to(h.device), fast
            )
        names, logs = (stack_rows(found, name, h.device) for name in ("names", "logs"))
        return top_k_kl(h, head, names.long(), logs.float(), fast)

    def compute_outputs(self, rows: Packed, fast: bool) -> Row:
        """The teacher's outputs on some rows, as they are kept."""
        with torch.no_grad():
            hidden = run_in_forward(self.model, lambda: last_hidden(self.model, rows, fast))
            if not self.keeping.top_k:
                return {"hidden": hidden.to(self.keeping.dtype)}
            names, logs = top_k_log_probs(
                hidden.flatten(0, 1), self.model.get_output_embeddings(), self.keeping.top_k
            )
            batch = hidden.shape[:2]
            return {"names": names.unflatten(0, batch), "logs": logs.unflatten(0, batch)}

    def read_layer_records(
        self, rows: Packed, layers: Sequence[int], fast: bool
    ) -> Iterator[tuple[int, LayerRecord]]:
        """(layer, what its attention saw and gave) of these layers."""
        found = self.fetch_rows(
            rows,
            fast,
            self.layerwise_kind(layers),
            lambda some, fast: self.compute_layer_outputs(some, layers, fast),
        )
        device = rows.device
        for layer in layers:
            given, made = (
                stack_rows(found, f"{layer}.{name}", device).float()
                for name in ("inputs", "outputs")
            )
            turned = f"{layer}.cos" in found[0]
            tables = (
                tuple(stack_rows(found, f"{layer}.{name}", device) for name in ("cos", "sin"))
                if turned
                else None
            )
            yield layer, LayerRecord(given, made, tables)  # type: ignore[arg-type]  # two of them

    def layerwise_kind(self, layers: Sequence[int]) -> str:
        """The name under which these layers' inputs and outputs are kept."""
        return (
            f"layers {','.join(map(str, layers))}:{str(self.keeping.dtype).removeprefix('torch.')}"
        )

    def compute_layer_outputs(self, rows: Packed, layers: Sequence[int], fast: bool) -> Row:
        """The teacher's layers on some rows, as they are kept."""
        kept: Row = {}

        def keep_record(layer: int, record: LayerRecord) -> None:
            kept[f"{layer}.inputs"], kept[f"{layer}.outputs"] = (
                value.to(self.keeping.dtype) for value in (record.inputs, record.outputs)
            )
            for name, table in zip(("cos", "sin"), record.rotary or (), strict=False):
                kept[f"{layer}.{name}"] = table.expand(len(rows), *table.shape[1:])

        with (
            record_layers(self.slots, list(layers), keep_record),
            torch.autocast(rows.device.type, torch.bfloat16, enabled=fast),
        ):
            run_in_forward(
                self.model, lambda: run_decoder(self.model, rows.input_ids, rows.position_ids)
            )
        return kept

    def fetch_rows(
        self, rows: Packed, fast: bool, kind: str, say: Callable[[Packed, bool], Row]
    ) -> list[Row]:
        """What is kept of every row; what is missing is computed and kept."""
        shelf, keys = self.row_store(kind, fast), row_keys(rows)
        found = [shelf.get(key) for key in keys]
        missing = self.find_rows_to_compute([row is None for row in found])
        for key, row in zip(keys, found, strict=True):
            if row is not None and key not in shelf:  # its file was damaged elsewhere
                shelf.add(key, row)
        self.read += len(keys) - len(missing)
        self.computed += len(missing)
        if missing:
            made = say(rows[missing], fast)
            for at, number in enumerate(missing):
                found[number] = {name: value[at] for name, value in made.items()}
                shelf.add(keys[number], found[number] or {})
        return [row for row in found if row is not None]

    def find_rows_to_compute(self, lost: list[bool]) -> list[int]:
        """Which rows the teacher is run on: those that are lost; under torchrun all when any process lost one."""
        if distributed.world_size() > 1:
            return list(range(len(lost))) if any(distributed.all_gather(any(lost))) else []
        return [number for number, gone in enumerate(lost) if gone]

    def cost_key(self, rows: Packed, fast: bool, layers: Sequence[int] | None) -> str:
        """What the teacher's share of a step's FLOPs depends on: on how many rows it runs."""
        shelf = self.row_store(
            self.keeping.kind if layers is None else self.layerwise_kind(layers), fast
        )
        return f"teacher on {len(self.find_rows_to_compute([key not in shelf for key in row_keys(rows)]))}"

    def row_store(self, kind: str, fast: bool) -> RowStore:
        """Where outputs of one kind are."""
        name = f"{kind} {'bfloat16' if fast else 'float32'}"
        if name not in self.shelves:
            facts = {"teacher": str(self.checkpoint.origin.resolve()), "kept": kind, "fast": fast}
            facts |= {"fingerprint": lineage.fingerprint(self.checkpoint, 0)}
            digest = hashlib.sha256(f"{facts['fingerprint']} {name}".encode()).hexdigest()[:24]
            self.shelves[name] = RowStore(self.keeping.folder, digest, self.keeping.size, facts)
        return self.shelves[name]

    def flush(self) -> dict[str, Any]:
        """Write what waits and say what came of it: rows read and computed, and, of the rows that were new, how many
        were kept and how many found no room; files that were damaged.
        """
        for shelf in self.shelves.values():
            shelf.flush()
        told = {
            key: sum(getattr(shelf, key) for shelf in self.shelves.values())
            for key in ("kept", "refused", "damaged")
        }
        return {"read": self.read, "computed": self.computed, **told, "bytes": self.keeping.size}


Teacher = PreTrainedModel | CachedTeacher


def row_keys(rows: Packed) -> list[str]:
    """A name for every row, from its token ids and positions."""
    both = torch.stack((rows.input_ids, rows.position_ids), 1).to("cpu", torch.int64).contiguous()
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in both]


def stack_rows(rows: list[Row], name: str, device: torch.device) -> Tensor:
    """One tensor of all rows, (rows, ...); hidden states in float32."""
    value = torch.stack([row[name] for row in rows]).to(device)
    return value.float() if value.is_floating_point() else value
