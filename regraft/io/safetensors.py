"""Safetensors files: checked headers, one tensor at a time, what goes into which shard."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RegraftError
from .files import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
WIDTHS |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: `dtype` as safetensors spells it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def torch_dtype(self) -> torch.dtype:
        """The floating-point dtype; RegraftError for integers, which means a quantised model."""
        if self.dtype not in DTYPES:
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' is {self.dtype}, not floating point:"
                " dequantise the model first"
            )
        return DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The tensor's values; RegraftError when they cannot be read or are not finite."""
        try:
            with safe_open(self.file, framework="pt") as file:
                value: Tensor = file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise RegraftError(
                f"cannot read '{self.name}' from '{self.file}' ({error}): fetch the file again"
            ) from error
        if value.numel() and not all(bound.isfinite() for bound in value.aminmax()):
            raise RegraftError(
                f"tensor '{self.name}' in '{self.file}' holds NaN or infinity: fetch the file again"
            )
        return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory; RegraftError says what is missing."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / INDEX).exists():
        names = sorted(set(_read_index(folder).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise RegraftError(
                f"'{folder}' lacks shard '{missing[0]}' that {INDEX} lists: fetch it"
            )
        return [folder / name for name in names]
    if pickles := sorted(folder.glob("*.bin")):
        raise RegraftError(
            f"'{pickles[0]}' is a pickle, which is never loaded: convert it with "
            "`python -m safetensors.torch_convert` or transformers' save_pretrained"
        )
    raise RegraftError(
        f"no model.safetensors or {INDEX} in '{folder}': give a Hugging Face model directory or a"
        " GGUF file"
    )


def _read_index(folder: Path) -> dict[str, str]:
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise RegraftError(
            f"'{folder / INDEX}' has no weight_map of tensor to file: fetch it again"
        )
    return table


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model directory by name, from the headers alone."""
    found: dict[str, TensorEntry] = {}
    files = weight_files(folder)
    for file in files:
        for entry in read_header(file):
            if entry.name in found:
                raise RegraftError(
                    f"tensor '{entry.name}' is in '{found[entry.name].file}' and in '{file}':"
                    " remove one"
                )
            found[entry.name] = entry
    listed = _read_index(folder) if files[0].name != "model.safetensors" else {}
    if missing := sorted(set(listed) - set(found)):
        raise RegraftError(
            f"'{folder / listed[missing[0]]}' lacks tensor '{missing[0]}' that {INDEX} lists: fetch"
            " it again"
        )
    return found


def read_header(file: Path) -> list[TensorEntry]:
    """The header of a safetensors file, checked against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise RegraftError(
                f"'{file}' is cut short or not safetensors ({size} bytes): fetch it again"
            )
        raw = stream.read(length)
    try:
        table = json.loads(raw)
        rows = {name: row for name, row in table.items() if name != "__metadata__"}
        found = [
            TensorEntry(file, name, row["dtype"], tuple(row["shape"])) for name, row in rows.items()
        ]
        spans = sorted(tuple(row["data_offsets"]) for row in rows.values())
        bytes_of = {
            name: math.prod(row["shape"]) * WIDTHS.get(row["dtype"], 0)
            for name, row in rows.items()
        }
        fits = all(
            row["data_offsets"][1] - row["data_offsets"][0]
            == (bytes_of[name] or row["data_offsets"][1] - row["data_offsets"][0])
            for name, row in rows.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RegraftError(
            f"'{file}' has a garbled safetensors header ({error}): fetch it again"
        ) from error
    gapless = all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))
    end = spans[-1][1] if spans else 0
    if not fits or not gapless or 8 + length + end != size:
        expected = 8 + length + end
        raise RegraftError(
            f"'{file}' has {size} bytes where its header says {expected}: cut short or damaged,"
            " fetch it again"
        )
    return found


def group_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, grouped so that a group holds at most `limit` bytes or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
