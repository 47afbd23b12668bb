"""Safetensors files: checked headers, tensors read one at a time, sizes of shards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RegraftError
from .files import read_json, replace_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes per number.
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
WIDTHS |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library too


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

    def torch_dtype(self) -> torch.dtype:
        """The floating-point dtype; RegraftError for any other, which means a quantised model."""
        if self.dtype not in DTYPES:
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' is {self.dtype}, not floating point: "
                "dequantise the model first"
            )
        return DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The tensor's values; RegraftError when they cannot be read or are not finite."""
        try:
            with safe_open(self.file, framework="pt") as file:
                value: Tensor = file.get_tensor(self.name)
        except MemoryError as error:  # the library does not say what for
            size = self.file.stat().st_size
            raise MemoryError(f"unable to mmap {size} bytes from '{self.file}'") from error
        except (OSError, SafetensorError) as error:
            raise RegraftError(
                f"cannot read '{self.name}' from '{self.file}' ({error}): fetch the file again"
            ) from error

        # NaN comes out of `aminmax` too, so two numbers tell about all.
        if value.numel() and not all(bound.isfinite() for bound in value.aminmax()):
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' holds NaN or infinity: fetch the file again"
            )
        return value


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a model directory; RegraftError when there are none, or not all."""
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
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise RegraftError(
            f"'{folder / INDEX}' has no weight_map of tensor to file: fetch it again"
        )
    return table


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
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise RegraftError(
                f"'{file}' is cut short or not safetensors ({size} bytes): fetch it again"
            )
        raw = stream.read(length)

    # A header may be any JSON, so every look-up can fail; one handler covers them all.
    try:
        table = json.loads(raw)
        rows = {name: row for name, row in table.items() if name != "__metadata__"}
        entries = [
            TensorEntry(file, name, row["dtype"], tuple(row["shape"])) for name, row in rows.items()
        ]
        spans = sorted(tuple(row["data_offsets"]) for row in rows.values())
        shapes_fit = all([_fits_span(row) for row in rows.values()])  # every row is looked at
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RegraftError(
            f"'{file}' has a garbled safetensors header ({error}): fetch it again"
        ) from error

    # Tensors lie one behind the other without gaps, and the last one ends the file.
    gapless = all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))
    end = spans[-1][1] if spans else 0
    expected = 8 + length + end
    if not shapes_fit or not gapless or expected != size:
        raise RegraftError(
            f"'{file}' has {size} bytes where its header says {expected}: "
            "cut short or damaged, fetch it again"
        )
    return entries


def _fits_span(row: dict[str, Any]) -> bool:
    """Whether a tensor's bytes are as many as shape and dtype need; True for unknown dtypes."""
    span = row["data_offsets"][1] - row["data_offsets"][0]
    needed = math.prod(row["shape"]) * WIDTHS.get(row["dtype"], 0)
    return bool(needed in (0, span))


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
