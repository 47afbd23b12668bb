"""Undoing a growth: the source's files of weights, byte for byte, from the grown model alone.

No formula is inverted. The recorded steps are done again on a model whose numbers say where they
stand; what comes out says where the grown model keeps each number of the source. The files that are
written must have the sha256 that lineage.json recorded of the source's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import lineage
from ..core.anatomy import Key, find_anatomy, read_as_auto
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.model_tensors import TIES, match_names
from ..core.shapes import Float, Int
from ..core.side_files import SOURCE_CARD
from ..core.undo import FILE, STEPS, Undo, read_undo, tensor_bytes, unpack
from ..errors import RegraftError
from ..io import output, shard_writer
from ..io.files import check_inside, parse_json
from ..io.safetensors import DTYPES, HeaderRow
from ..io.schema import check_json
from .recorded_steps import replay_step

# Why steps cannot be undone.
REASONS = {
    "Train": "training moved the weights",
    "Learned": "LiGO's maps mix the weights",
    "Adopt": "it left tensors of the source out",
}
# Steps that move no numbers: what they change is in undo.json, or is undone by its dtypes.
STILL = ("Store", "Tie")
FILE_LIMIT = 1 << 28  # bytes of a file that undo.json holds


@dataclass(frozen=True)
class ShrunkModel:
    """A grown model, and where the numbers of its source stand in it."""

    grown: Checkpoint
    undo: Undo
    # The source: its config, tensors that `track` makes say where they stand.
    source: Checkpoint
    # The source and what each step makes of it.
    stages: list[Checkpoint]
    # Name of the source's tensor that says where its numbers stand; those of all others are NaN.
    tracked: list[str] = field(default_factory=lambda: [""])

    @classmethod
    def open(cls, path: str | Path) -> ShrunkModel:
        """A grown model from its directory; reads no weights.

        RegraftError when it is none, or a step cannot be undone.
        """
        grown = Checkpoint.open(path)
        grown.verify()
        undo = read_undo(grown.path)
        check_reversible(grown, undo)
        assert undo is not None
        tracked = [""]
        stages = [build_tracking_source(grown, undo, tracked)]
        for entry in grown.history:
            if entry["step"] not in STILL:
                arguments = dict(entry["arguments"])
                # The tokenizer that they are added to is no longer there, and moves no row.
                arguments |= {"tokens": []} if "tokens" in arguments else {}
                stages.append(replay_step(stages[-1], entry["step"], arguments))
        return cls(grown, undo, stages[0], stages, tracked)

    def read(self, name: str) -> Float[Tensor, "*stored"]:
        """A tensor of the source by its name in the state dict; RegraftError when it is lost."""
        key = next(key for key, known in self.source.names.items() if known == name)
        shape, count = self.source.tensors[key].shape, self.source.tensors[key].size
        holders = find_holders(self.grown, name)
        for holder in holders:
            lazy = self.grown.tensors[holder]
            if lazy.provenance.kind == "copied" and lazy.shape == shape:
                return lazy.read()

        self.tracked[0] = name
        for holder in holders:
            places = find_places(self.stages[-1].tensors[holder].read(), count)
            if places is not None:
                return self.grown.tensors[holder].read().flatten()[places].reshape(shape)
        raise RegraftError(
            f"'{name}' of the source is not in '{self.grown.origin}' any more:"
            f" {self._find_culprit(name, count)} computed with its numbers, and rounding cannot be"
            " undone: keep the source"
        )

    def _find_culprit(self, name: str, count: int) -> str:
        """The first step after which no tensor holds all numbers of a source's one."""
        entries = [entry for entry in self.grown.history if entry["step"] not in STILL]
        for entry, stage in zip(entries, self.stages[1:], strict=True):
            lazies = [stage.tensors[holder] for holder in find_holders(stage, name)]
            if all(find_places(lazy.read(), count) is None for lazy in lazies):
                return lineage.format_step(entry)
        return lineage.format_step(entries[-1])


def check_reversible(grown: Checkpoint, undo: Undo | None) -> None:
    """RegraftError, with the reason, for a model whose growth cannot be undone."""
    for entry in grown.history:
        name = str(entry.get("step"))
        if name not in STEPS:
            why = REASONS.get(name, "it is no growth")
            raise RegraftError(
                f"'{grown.origin}' cannot shrink to its source because of the step {name}: {why};"
                " use the source"
            )
    overwritten = [row for entry in grown.history for row in entry.get("overwritten", ())]
    if overwritten and undo is not None:
        raise RegraftError(
            f"'{grown.origin}' cannot shrink to its source: added tokens took {len(overwritten)} of"
            f" its rows, from {overwritten[0]} on; use the source"
        )
    if undo is None:
        raise RegraftError(
            f"'{grown.origin}' has no {FILE}: only what regraft grew from a directory of"
            " safetensors shrinks, and only to its source"
        )


def build_tracking_source(grown: Checkpoint, undo: Undo, tracked: list[str]) -> Checkpoint:
    """The source as it was, with numbers that say where they stand.

    Args:
        grown: what came of it.
        undo: of the grown model.
        tracked: holds the name of the tensor whose numbers do; those of others are NaN.
    """
    config = read_as_auto(read_source_json(grown, undo, "config.json"))
    anatomy = find_anatomy(config)
    placed = anatomy.place(config)

    def build_reader(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if tracked[0] != name:
                return torch.full(shape, torch.nan, dtype=torch.float64)
            # Odd numbers: halves and doubles of them are none of them.
            count = torch.Size(shape).numel()
            return (torch.arange(count, dtype=torch.float64) * 2 + 1).reshape(shape)

        return read

    tensors = {
        key: LazyTensor(
            part.shape,
            torch.float64,
            Provenance("copied", (part.name,)),
            build_reader(part.name, part.shape),
        )
        for key, part in placed.items()
    }
    names = {key: part.name for key, part in placed.items()}
    sizes = anatomy.solve(config)
    return Checkpoint(
        grown.origin, config, anatomy, sizes, tensors, names, grown.folder, allow_nonfinite=True
    )


def find_holders(checkpoint: Checkpoint, name: str) -> list[Key]:
    """Tensors that are made from the source's tensor of a name, plain copies first."""
    found = [key for key, lazy in checkpoint.tensors.items() if name in lazy.provenance.sources]
    return sorted(found, key=lambda key: checkpoint.tensors[key].provenance.kind != "copied")


def find_places(tracking: Float[Tensor, "*grown"], count: int) -> Int[Tensor, " count"] | None:
    """Where each number of a source's tensor stands in a grown one, None when some does nowhere.

    Args:
        tracking: the grown form of the odd numbers 1, 3, .. in order.
        count: how many they are.
    """
    flat = tracking.flatten()
    number = (flat - 1) / 2
    valid = (flat % 2 == 1) & (number >= 0) & (number < count)
    places = valid.nonzero()[:, 0]
    first = torch.full((count,), len(flat)).scatter_reduce_(
        0, number[places].long(), places, "amin"
    )
    return None if bool((first == len(flat)).any()) else first


def read_source_json(grown: Checkpoint, undo: Undo, name: str) -> dict[str, Any]:
    """A JSON file of the source; from undo.json, or from the output where that has the same."""
    value: dict[str, Any] = parse_json(
        read_source_file(grown, undo, name), f"{FILE}: {name}", "make the model again"
    )
    return value


def read_source_file(grown: Checkpoint, undo: Undo, name: str) -> bytes:
    """A file beside the source's weights, as it was."""
    if name in undo["files"]:
        return unpack(undo["files"][name], FILE_LIMIT)
    file = grown.path / (SOURCE_CARD if name == lineage.CARD else name)
    check_inside(grown.path, file)
    return file.read_bytes()


def shrink(path: str | Path, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the source of a grown model, byte for byte: weights, config, files beside them.

    RegraftError, and nothing is written, where growth or training changed numbers so that they
    cannot be had back; the message names the tensor and the step.

    Args:
        path: directory of the grown model.
        out: directory to write.
        overwrite: whether it may replace an output of regraft.

    Returns:
        `files`, sha256 of every file of weights, as lineage.json has it; `tensors`, their number;
        `kept`, how many of them undo.json held; `missing`, files of the source that stayed behind
        when it grew.
    """
    output.check_apart(out, [("model", path)])
    model = ShrunkModel.open(path)
    grown, undo = model.grown, model.undo
    known = lineage.read_lineage(grown.path)
    recorded: Mapping[str, str] = known["source"]["files"]
    reads = {name: find_reads(model, header) for name, header in undo["headers"].items()}

    with shard_writer.new_directory(Path(out), overwrite) as partial:
        for name, header in undo["headers"].items():
            digest = write_file(partial.path / f"{name}.part", header, reads[name])
            if digest != recorded.get(name):
                raise RegraftError(
                    f"'{name}' of the source does not come back from '{grown.origin}': its numbers"
                    f" were rounded by {', '.join(map(lineage.format_step, grown.history))}; use"
                    " the source"
                )
            partial.finish_file(name, digest)
        others = {*undo["names"], *undo["files"], "config.json"}
        for name in sorted(others):
            target = partial.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_source_file(grown, undo, name))

    return {
        "files": dict(recorded),
        "tensors": sum(map(len, reads.values())),
        "kept": len(undo["tensors"]),
        "missing": sorted(known.get("left_out", {})),
    }


def find_reads(model: ShrunkModel, header: str) -> dict[str, Callable[[], Tensor]]:
    """How each tensor of a file of the source is had back, by its name in the file.

    Args:
        model: the grown one.
        header: of the file.

    RegraftError for one that growth left out.
    """
    rows = parse_header(header)
    source, undo = model.source, model.undo
    canonical, _ = match_names(rows, source.anatomy, source.config)
    by_name = {name: role for (role, _), name in source.names.items()}
    untied = source.anatomy.place(source.anatomy.untie_embeddings(source.config))
    heads = {untied[head, None].name: twin for head, twin in TIES.items() if (head, None) in untied}
    reads: dict[str, Callable[[], Tensor]] = {}

    for raw, row in rows.items():
        name = canonical.get(raw, raw)
        twin = heads.get(name)
        kept = undo["tensors"].get(name) or undo["tensors"].get(raw)
        # A head that is stored beside the embedding that it is tied to has its numbers.
        if twin and name not in by_name:
            name = source.names[twin, None]
        if kept is None and name not in source.names.values():
            raise RegraftError(
                f"'{raw}' of the source is not in '{model.grown.origin}': growth left it out; use"
                " the source"
            )
        reads[raw] = _build_read(model, name, kept, row)
    return reads


def parse_header(header: str) -> dict[str, HeaderRow]:
    """The tensors that the header of a file of weights lists; RegraftError when it is garbled."""
    where, remedy = f"{FILE}: a header", "make the model again"
    rows: dict[str, Any] = parse_json(header.encode(), where, remedy)
    rows.pop("__metadata__", None)
    checked: dict[str, HeaderRow] = check_json(rows, dict[str, HeaderRow], where, remedy)
    return checked


def _build_read(
    model: ShrunkModel, name: str, kept: str | None, row: HeaderRow
) -> Callable[[], Tensor]:
    if kept is None:
        dtype = DTYPES[row["dtype"]]
        return lambda: model.read(name).to(dtype)
    data = bytearray(unpack(kept, FILE_LIMIT))
    return lambda: torch.frombuffer(data, dtype=torch.uint8)


def write_file(file: Path, header: str, reads: Mapping[str, Callable[[], Tensor]]) -> str:
    """Write a file of weights with a header that is given; returns its sha256.

    Args:
        file: to write.
        header: with the place of each tensor.
        reads: the values of tensors by name.
    """
    rows = parse_header(header)
    head = header.encode()
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for data in (len(head).to_bytes(8, "little"), head):
            digest.update(data)
            stream.write(data)
        for name in sorted(reads, key=lambda name: rows[name]["data_offsets"]):
            data = tensor_bytes(reads[name]())
            digest.update(data)
            stream.write(data)
    return digest.hexdigest()
