"""What undoing a growth needs beside the grown weights: undo.json, written with every grown model.

It holds the layout of the source's files of weights, the small tensors that growth rescales (gains
of norms), and the files beside them that the output has otherwise.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ..errors import RegraftError
from ..io import safetensors
from ..io.files import read_own_json, write_json
from . import lineage

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

FILE = "undo.json"
# Steps that leave the source's numbers in place, most of them; the others say why not.
STEPS = (
    "Widen",
    "Deepen",
    "Bridge",
    "Untie",
    "Tie",
    "Carry",
    "Transplant",
    "GrowVocab",
    "AddExperts",
    "GrowTower",
    "Store",
)
SMALL = 1 << 16  # numbers of a tensor that is kept
PACKED_BYTES = 32_000_000  # of all kept files, compressed


class Undo(TypedDict):
    """The content of undo.json. Bytes are packed by `pack`."""

    names: list[str]  # files beside the source's weights
    headers: dict[str, str]  # file of the source's weights -> its header
    tensors: dict[str, str]  # tensor of the source -> its bytes
    files: dict[str, str]  # file of the source that the output has otherwise -> its bytes


def pack(data: bytes) -> str:
    """Bytes as text, compressed."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpack(text: str, limit: int) -> bytes:
    """The bytes of `pack`; RegraftError when they are damaged or more than `limit`."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), limit + 1)
    except (ValueError, zlib.error) as error:
        raise RegraftError(f"{FILE} is damaged ({error}): make the model again") from error
    if len(data) > limit:
        raise RegraftError(f"{FILE} holds more than {limit:,} bytes for a file: make it again")
    return data


def read_undo(folder: Path) -> Undo | None:
    """undo.json of a directory, None without it; RegraftError when it is damaged."""
    if not (folder / FILE).is_file():
        return None
    undo: Undo = read_own_json(folder / FILE, Undo, "make the model again")
    for name in (*undo["names"], *undo["files"], *undo["headers"]):
        if Path(name).is_absolute() or not name or ".." in Path(name).parts:
            raise RegraftError(
                f"'{folder / FILE}' names '{name}', outside of its folder: make the model again"
            )
    return undo


def write_undo(grown: Checkpoint, folder: Path, side_files: Collection[str]) -> None:
    """Write undo.json into a directory that has all other files; nothing where no undoing is.

    Args:
        grown: what is written there.
        folder: the directory.
        side_files: files beside the weights of what grew, which were copied.
    """
    reversible = all(step.get("step") in STEPS for step in grown.history)
    has_files = not (grown.in_memory or grown.folder is None or grown.is_computed)
    if not grown.history or not reversible or not has_files:
        return
    # What grew may have grown itself: the first source counts.
    undo = read_undo(grown.path)
    if undo is None:
        if lineage.read_lineage(grown.path):
            return
        headers = {file.name: read_header(file) for file in safetensors.weight_files(grown.weights)}
        undo = {"names": sorted(side_files), "headers": headers, "tensors": {}, "files": {}}

    undo["tensors"] |= dict(_iter_rescaled(grown)) | undo["tensors"]
    undo["files"] |= dict(_iter_changed(grown.path, folder, undo["names"])) | undo["files"]
    if sum(map(len, undo["files"].values())) <= PACKED_BYTES:
        write_json(folder / FILE, undo)


def read_header(file: Path) -> str:
    """The header of a file of weights, as it stands there."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(length).decode("utf-8")


def tensor_bytes(value: Tensor) -> bytes:
    """The bytes of a tensor, as files have them."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _iter_rescaled(grown: Checkpoint) -> Iterator[tuple[str, str]]:
    """(name, bytes) of small tensors of the source that growth computes with."""
    source = type(grown).open(grown.weights, allow_nonfinite=True)
    names: set[str] = set()
    for lazy in grown.tensors.values():
        if lazy.provenance.kind == "grown":
            names |= set(lazy.provenance.sources)

    for key, lazy in source.tensors.items():
        is_first = lazy.provenance.kind == "copied" and source.names[key] in names
        if is_first and len(lazy.shape) == 1 and lazy.size <= SMALL:
            yield source.names[key], pack(tensor_bytes(lazy.read()))


def _iter_changed(before: Path, after: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name, bytes) of files of a directory that another one has otherwise or not at all."""
    for name in sorted({*names, "config.json", safetensors.INDEX} - {lineage.CARD}):
        old, new = before / name, after / name
        if not old.is_file():
            continue
        data = old.read_bytes()
        if not new.is_file() or new.read_bytes() != data:
            yield name, pack(data)
