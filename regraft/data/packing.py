"""Text to token windows: documents packed into rows, positions restarting at every document; images with labels."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import RegraftError
from .documents import BadLines, ReadPosition, read_pieces
from .files import find_files
from .rows import Packed
from .tokenizer import count_bytes, end_token_ids


@dataclass(frozen=True)
class Images:
    """Labelled images: pixel_values (n, channels, height, width) float32, as the model takes them; labels (n,) long."""

    pixel_values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixel_values[rows], self.labels[rows])

    @property
    def tokens(self) -> int:
        """How many images there are: what a stage's budget counts."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.pixel_values.device

    def to(self, device: torch.device) -> Images:
        """The same images on a device."""
        return Images(self.pixel_values.to(device), self.labels.to(device))


def read_images(path: str | Path) -> Images:
    """Images of a .npz file: `pixel_values` (n, channels, height, width) of floats and `labels` (n,) of whole numbers.

    Raises RegraftError on a missing file, one that is no .npz, a missing array, a wrong shape or kind of number.
    """
    if Path(path).suffix != ".npz":
        raise RegraftError(
            f"cannot read '{path}' as images: give a .npz file with pixel_values and labels"
        )
    if not Path(path).is_file():
        raise RegraftError(f"no images at '{path}': give a .npz file with pixel_values and labels")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("pixel_values", "labels") if name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise RegraftError(
            f"'{path}' is no readable .npz file ({error}): save it again with numpy.savez"
        ) from error
    if lost := [name for name in ("pixel_values", "labels") if name not in arrays]:
        raise RegraftError(f"'{path}' has no array '{lost[0]}': it needs pixel_values and labels")
    pixels, labels = arrays["pixel_values"], arrays["labels"]
    if pixels.ndim != 4 or pixels.dtype.kind != "f":
        raise RegraftError(
            f"pixel_values in '{path}' are {pixels.dtype} {list(pixels.shape)}: they must be floats (n, channels, "
            "height, width), normalised as the model's image processor does it"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise RegraftError(
            f"labels in '{path}' are {labels.dtype} {list(labels.shape)}: they must be one whole number for each of "
            f"the {len(pixels)} images"
        )
    return Images(
        torch.from_numpy(pixels.astype("float32")), torch.from_numpy(labels.astype("int64"))
    )


def read_documents(path: str | Path, name: str = "text") -> list[str]:
    """All documents of a path, see `corpus.files.found`: of .txt between two blank lines, else the field `name`.

    Raises RegraftError on a missing path, a wrong suffix, a line that cannot be read, or no text at all.
    """
    documents: list[str] = []
    for file in find_files(path):
        open_one: list[str] = []
        for piece in read_pieces(file, name, ReadPosition(), BadLines()):
            open_one.append(piece.text)
            if piece.ends:
                documents.append("".join(open_one))
                open_one = []
    if not documents:
        raise RegraftError(f"no text in '{path}': it holds no document with at least one word")
    return documents


def _tokenize(documents: list[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(documents, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return [ids + end_token_ids(tokenizer) for ids in encoded]


def pack(documents: list[str], tokenizer: Any, length: int) -> Packed:
    """All documents end to end, cut into rows of `length` tokens; a document's positions restart at the cut.

    The last incomplete row is dropped. Raises RegraftError when there is not one full row.
    """
    rows = _tokenize(documents, tokenizer)
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    count = len(ids) // length
    if not count:
        raise RegraftError(
            f"the text has {len(ids)} tokens, less than one row of {length}: give more text or a shorter length"
        )
    ids, positions = (
        ids[: count * length].view(count, length),
        positions[: count * length].view(count, length),
    )
    first_of_document = torch.where(
        positions <= torch.arange(length), torch.arange(length) - positions, 0
    )
    positions = torch.arange(length) - first_of_document.cummax(1).values
    mask, special = (
        getattr(tokenizer, "mask_token_id", None),
        getattr(tokenizer, "all_special_ids", ()),
    )
    return Packed(ids, positions, count_bytes(ids, tokenizer), mask, tuple(special))


def long_windows(documents: list[str], tokenizer: Any, length: int) -> Packed:
    """Rows of `length` tokens that each lie inside one document; shorter documents and remainders are left out.

    Raises RegraftError when no document is long enough.
    """
    rows = [
        row[start : start + length]
        for row in _tokenize(documents, tokenizer)
        for start in range(0, len(row) - length + 1, length)
    ]
    if not rows:
        raise RegraftError(
            f"no document has {length} tokens: give longer documents or a shorter length"
        )
    ids = torch.tensor(rows)
    return Packed(
        ids, torch.arange(length).expand_as(ids).contiguous(), count_bytes(ids, tokenizer)
    )


def shuffled_indices(rows: int, count: int, seed: int) -> Tensor:
    """`count` row numbers: whole passes over the rows, each in its own seeded order."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(passes)[:count]
