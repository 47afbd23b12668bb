"""Safetensors files: checked headers, tensors read one at a time, sizes of shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RegraftError, explain_errors
from .files import check_inside, check_regular_file, parse_json, read_json, replace_file
from .finite import check_finite
from .linux import free_memory
from .schema import check_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes per number.
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
WIDTHS |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
# Bytes of a header. A tensor takes some 150, so this is room for 170,000 in one file; the library's
# own limit is four times as much.
HEADER_LIMIT = 25_000_000
MAX_DIMENSIONS = 64  # of a tensor, PyTorch's own limit


class HeaderRow(TypedDict):
    """What the header of a file says about a tensor."""

    dtype: str  # as safetensors writes it, such as "BF16"
    shape: list[int]
    data_offsets: tuple[int, int]  # of the first byte and behind the last, from the header's end


class ShardIndex(TypedDict):
    """The index of a sharded model."""

    weight_map: dict[str, str]  # tensor -> file


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, known from the file's header."""

    # The safetensors file.
    file: Path
    # The tensor's name in it.
    name: str
    # Dtype as safetensors writes it, such as "BF16".
    dtype: str
    # Shape as stored.
    shape: tuple[int, ...]
    # Whether `read` takes NaN and infinity.
    allow_nonfinite: bool = False

    def torch_dtype(self) -> torch.dtype:
        """The floating-point dtype; RegraftError for any other, which means a quantised model."""
        if self.dtype not in DTYPES:
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' is {self.dtype}, not floating point: "
                "dequantise the model first"
            )
        return DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The tensor's values; RegraftError when they cannot be read, or are not finite and that is
        not allowed.
        """
        with explain_tensor_errors(self.file, self.name, self.bytes):
            with safe_open(self.file, framework="pt") as file:
                value: Tensor = file.get_tensor(self.name)

        if not self.allow_nonfinite:
            advice = "fetch the file again; grow, linearize and train take --allow-nonfinite"
            check_finite(value, f"tensor '{self.name}' in '{self.file}'", advice)
        return value

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * WIDTHS.get(self.dtype, 1)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a model directory.

    RegraftError when there are none, or not all, and when one lies outside of the directory.
    """
    files = _find_weight_files(folder)
    for file in files:
        check_inside(folder, file)
    return files


def _find_weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]

    if (folder / INDEX).exists():
        names = sorted(set(_read_index(folder).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise RegraftError(
                f"'{folder}' lacks shard '{missing[0]}' that {INDEX} lists: fetch it"
            )
        return [folder / name for name in names]

    # Unpickling may run any code, so these are refused rather than converted.
    if pickles := sorted(folder.glob("*.bin")):
        raise RegraftError(
            f"'{pickles[0]}' is a pickle, which is never loaded: convert it with "
            "`python -m safetensors.torch_convert` or transformers' save_pretrained"
        )
    raise RegraftError(
        f"no model.safetensors or {INDEX} in '{folder}': "
        "give a Hugging Face model directory or a GGUF file"
    )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a sharded model lists them."""
    index: ShardIndex = read_json(folder / INDEX, ShardIndex)
    return index["weight_map"]


@contextmanager
def explain_tensor_errors(file: Path, name: str, size: int) -> Iterator[None]:
    """Inside, what the safetensors library raises becomes a RegraftError.

    Args:
        file: the file that is read.
        name: of the tensor, or "" for all of them.
        size: bytes that reading takes.
    """
    what = f"cannot read '{name}' from '{file}'" if name else f"cannot read '{file}'"
    try:
        with explain_errors(what, "fetch the file again"):
            yield
    except RegraftError as error:
        # PyTorch and safetensors do not raise MemoryError, but errors of their own.
        free = free_memory()
        if free is not None and size > free:
            raise RegraftError(
                f"{what}: it needs {size:,} bytes of memory, there are {free:,}: free some memory, "
                "or use a machine with more"
            ) from error
        raise


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model directory by name, from the headers alone.

    RegraftError when a tensor is in two files, or the index lists one that is in none.
    """
    found: dict[str, TensorEntry] = {}
    files = weight_files(folder)
    for file in files:
        for entry in read_header(file):
            if entry.name in found:
                raise RegraftError(
                    f"tensor '{entry.name}' is in '{found[entry.name].file}' and in '{file}': "
                    "remove one"
                )
            found[entry.name] = entry

    # A download may have fetched an index of one revision and shards of another.
    listed = _read_index(folder) if files[0].name != "model.safetensors" else {}
    if missing := sorted(set(listed) - set(found)):
        raise RegraftError(
            f"'{folder / listed[missing[0]]}' lacks tensor '{missing[0]}' that {INDEX} lists: "
            "fetch it again"
        )
    return found


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors that the header of a safetensors file lists, in its order.

    RegraftError when the header is garbled or does not fit the file's size.
    """
    check_regular_file(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise RegraftError(
                f"'{file}' is cut short or not safetensors ({size} bytes): fetch it again"
            )
        if length > HEADER_LIMIT:
            raise RegraftError(
                f"'{file}' has a header of {length:,} bytes, more than the limit of "
                f"{HEADER_LIMIT:,}: save the model in shards"
            )
        raw = stream.read(length)

    remedy = "fetch it again"
    where = f"'{file}' has a garbled safetensors header that"
    table = check_json(parse_json(raw, where, remedy), dict[str, Any], where, remedy)
    check_json(table.pop("__metadata__", {}), dict[str, str], where, remedy)
    check_json(table, dict[str, HeaderRow], where, remedy)

    entries = [
        TensorEntry(file, name, row["dtype"], tuple(row["shape"])) for name, row in table.items()
    ]
    spans = sorted(tuple(row["data_offsets"]) for row in table.values())
    shapes_fit = all(_fits_span(row) for row in table.values())

    # Tensors lie one behind the other without gaps, and the last one ends the file.
    ends = [0, *(end for _, end in spans)]
    gapless = all(end == span[0] for end, span in zip(ends, spans, strict=False))
    end = spans[-1][1] if spans else 0
    expected = 8 + length + end
    if not shapes_fit or not gapless or expected != size:
        raise RegraftError(
            f"'{file}' has {size} bytes where its header says {expected}: "
            "cut short or damaged, fetch it again"
        )
    return entries


def _fits_span(row: HeaderRow) -> bool:
    """Whether a tensor's bytes are as many as shape and dtype need; True for unknown dtypes."""
    shape, (begin, end) = row["shape"], row["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or min((0, *shape, begin, end - begin)) < 0:
        return False
    return row["dtype"] not in WIDTHS or math.prod(shape) * WIDTHS[row["dtype"]] == end - begin


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; RegraftError when it is damaged or there is no memory."""
    entries = read_header(file)
    with explain_tensor_errors(file, "", sum(entry.bytes for entry in entries)):
        values: dict[str, Tensor] = load_file(file)
    return values


def group_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor has a group of its own.

    Args:
        sizes: tensor -> bytes.
        limit: bytes in a group.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all; RegraftError when the disk is full."""
    try:
        with replace_file(file) as part:
            save_file(dict(tensors), part)
    except (OSError, SafetensorError) as error:  # the library wraps a full disk in its own
        raise RegraftError(
            f"cannot write '{file}' ({error}): free some space and run the same command again"
        ) from error
