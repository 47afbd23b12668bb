"""Safetensors files: checked headers, tensors read one at a time, sizes of shards."""

from __future__ import annotations

import math
import re
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
from .foreign_weights import explain_missing_weights
from .linux import free_memory
from .schema import check_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes per number.
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
WIDTHS |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in another dtype, as transformers' `variant` names them.
VARIANT = re.compile(
    r"model\.(?P<single>[^./]+(?<!-of-\d{5}))\.safetensors"
    r"|model\.safetensors\.index\.(?P<sharded>[^./]+)\.json"
)
COMPARED = 1 << 22  # numbers that are compared at a time
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
            kind = "eight bits" if self.dtype.startswith("F8") else "not floating point"
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' is {self.dtype}, {kind}: "
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

    def peek(self) -> Tensor:
        """The values of a small tensor, for which no file is fetched."""
        return self.read()

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time; see `read` for errors.

        Args:
            rows: of a block.
        """
        with explain_tensor_errors(self.file, self.name, 0):
            with safe_open(self.file, framework="pt") as file:
                part = file.get_slice(self.name)
                for start in range(0, self.shape[0] if self.shape else 0, rows):
                    yield part[start : start + rows]

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * WIDTHS.get(self.dtype, 1)


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a model.

    Args:
        path: a model directory, or in it the file that names a variant (see `variant_file`).

    RegraftError when there are none, or not all, and when one lies outside of the directory.
    """
    files = _find_weight_files(path)
    for file in files:
        check_inside(path.parent if variant_of(path) else path, file)
    return files


def _find_weight_files(path: Path) -> list[Path]:
    if variant_of(path):
        return _read_shards(path) if path.suffix == ".json" else [path]

    single, index = path / SINGLE, path / INDEX
    if single.exists():
        if index.exists() and (others := {*_read_index(index).values()} - {SINGLE}):
            if all((path / name).is_file() for name in others):
                raise RegraftError(
                    f"'{path}' holds two sets of weights, {SINGLE} and those of {INDEX}: remove one"
                )
        return [single]
    if index.exists():
        return _read_shards(index)

    if variants := list_variants(path):
        raise RegraftError(
            f"'{path}' holds only variants of its weights ({', '.join(variants)}): give "
            f"--variant {variants[0]}"
        )
    raise explain_missing_weights(path, f"{SINGLE} or {INDEX}")


def _read_shards(index: Path) -> list[Path]:
    """The files that an index lists; RegraftError when one is missing."""
    names = sorted(set(_read_index(index).values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise RegraftError(
            f"'{index.parent}' lacks shard '{missing[0]}' that {index.name} lists: fetch it"
        )
    return [index.parent / name for name in names]


def _read_index(file: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a sharded model lists them."""
    index: ShardIndex = read_json(file, ShardIndex)
    return index["weight_map"]


def variant_of(path: Path) -> str | None:
    """The variant that a file of weights or its index is of, such as "fp16"; None for others."""
    match = VARIANT.fullmatch(path.name) if path.is_file() else None
    return match["single"] or match["sharded"] if match else None


def list_variants(folder: Path) -> list[str]:
    """The variants of the weights in a directory, as transformers names their files."""
    files = (*folder.glob("model.*.safetensors"), *folder.glob(f"{INDEX[:-5]}.*.json"))
    return sorted(set(filter(None, map(variant_of, files))))


def variant_file(path: str | Path, variant: str | None) -> str:
    """The path that stands for a variant of a model: that of its file, or of its index.

    Args:
        path: of the model directory.
        variant: such as "fp16"; None gives the path itself.

    RegraftError when the directory does not have it.
    """
    if variant is None:
        return str(path)
    folder = Path(path)
    for name in (f"model.{variant}.safetensors", f"{INDEX[:-5]}.{variant}.json"):
        if variant_of(folder / name) == variant:
            return str(folder / name)
    known = ", ".join(list_variants(folder)) or "none"
    raise RegraftError(
        f"'{path}' has no variant '{variant}' of its weights (it has {known}): give one it has, or "
        "leave out --variant"
    )


def have_equal_values(left: TensorEntry, right: TensorEntry) -> bool:
    """Whether two tensors hold the same numbers; reads on only while they do.

    RegraftError when they are no floating-point numbers or cannot be read.
    """
    if left.shape != right.shape:
        return False
    same_dtype = left.torch_dtype() == right.torch_dtype()
    rows = max(1, COMPARED // max(1, math.prod(left.shape[1:])))

    for one, other in zip(left.blocks(rows), right.blocks(rows), strict=True):
        if not torch.equal(*((one, other) if same_dtype else (one.float(), other.float()))):
            return False
    return True


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


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model by name, from the headers alone.

    Args:
        path: as `weight_files` takes it.

    RegraftError when a tensor is in two files, or the index lists one that is in none.
    """
    found: dict[str, TensorEntry] = {}
    files = weight_files(path)
    for file in files:
        for entry in read_header(file):
            if entry.name in found:
                raise RegraftError(
                    f"tensor '{entry.name}' is in '{found[entry.name].file}' and in '{file}': "
                    "remove one"
                )
            found[entry.name] = entry

    # A download may have fetched an index of one revision and shards of another.
    index = path if path.suffix == ".json" else path / INDEX
    listed = _read_index(index) if path not in files and files[0].name != SINGLE else {}
    if missing := sorted(set(listed) - set(found)):
        raise RegraftError(
            f"'{index.parent / listed[missing[0]]}' lacks tensor '{missing[0]}' that {index.name} "
            "lists: fetch it again"
        )
    return found


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors that the header of a safetensors file lists, in its order.

    RegraftError when the header is garbled or does not fit the file's size.
    """
    check_regular_file(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = read_header_length(file, stream.read(8), size)
        raw = stream.read(length)
    return [
        TensorEntry(file, name, row["dtype"], tuple(row["shape"]))
        for name, row in parse_header(file, raw, size).items()
    ]


def read_header_length(file: Path, raw: bytes, size: int) -> int:
    """The bytes of a header; RegraftError when they are more than there are, or too many.

    Args:
        file: for errors.
        raw: the file's first 8 bytes.
        size: bytes of the file.
    """
    length = int.from_bytes(raw, "little")
    if size < 8 or length > size - 8:
        raise RegraftError(
            f"'{file}' is cut short or not safetensors ({size} bytes): fetch it again"
        )
    if length > HEADER_LIMIT:
        raise RegraftError(
            f"'{file}' has a header of {length:,} bytes, more than the limit of "
            f"{HEADER_LIMIT:,}: save the model in shards"
        )
    return length


def parse_header(file: Path, raw: bytes, size: int) -> dict[str, HeaderRow]:
    """What a header says, by tensor; RegraftError when it is garbled or does not fit the file.

    Args:
        file: for errors.
        raw: the header.
        size: bytes of the file.
    """
    remedy = "fetch it again"
    where = f"'{file}' has a garbled safetensors header that"
    table = check_json(parse_json(raw, where, remedy), dict[str, Any], where, remedy)
    check_json(table.pop("__metadata__", {}), dict[str, str], where, remedy)
    check_json(table, dict[str, HeaderRow], where, remedy)

    spans = sorted(tuple(row["data_offsets"]) for row in table.values())
    shapes_fit = all(_fits_span(row) for row in table.values())

    # Tensors lie one behind the other without gaps, and the last one ends the file.
    ends = [0, *(end for _, end in spans)]
    gapless = all(end == span[0] for end, span in zip(ends, spans, strict=False))
    end = spans[-1][1] if spans else 0
    expected = 8 + len(raw) + end
    if not shapes_fit or not gapless or expected != size:
        raise RegraftError(
            f"'{file}' has {size} bytes where its header says {expected}: "
            "cut short or damaged, fetch it again"
        )
    rows: dict[str, HeaderRow] = table
    return rows


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
