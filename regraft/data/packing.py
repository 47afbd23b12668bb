"""Documents in memory to rows of tokens: packed end to end, or windows inside one document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RegraftError
from .documents import BadLines, ReadPosition, read_pieces
from .files import find_files
from .rows import Packed
from .tokenizer import count_bytes, end_token_ids


def read_documents(path: str | Path, name: str = "text") -> list[str]:
    """Read all documents of a path into memory.

    Args:
        path: file, pattern or folder, see `files.find_files`. A .txt file has a document between
            any two blank lines in a row.
        name: the key or column that holds the text in the other formats.

    RegraftError for a missing path, a wrong suffix, a line that cannot be read, or no text at all.
    """
    documents: list[str] = []
    for file in find_files(path):
        parts: list[str] = []  # of the document that is being read
        for piece in read_pieces(file, name, ReadPosition(), BadLines()):
            parts.append(piece.text)
            if piece.ends:
                documents.append("".join(parts))
                parts = []
    if not documents:
        raise RegraftError(f"no text in '{path}': it holds no document with at least one word")
    return documents


def _tokenize(documents: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, with the token that ends a document."""
    encoded: list[list[int]] = tokenizer(documents, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return [ids + end_token_ids(tokenizer) for ids in encoded]


def pack(documents: list[str], tokenizer: Any, length: int) -> Packed:
    """Put all documents end to end and cut them into rows of `length` tokens.

    Positions restart at each document and at each row. The last incomplete row is dropped.
    RegraftError when there is not one full row.
    """
    rows = _tokenize(documents, tokenizer)
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    count = len(ids) // length
    if not count:
        raise RegraftError(
            f"the text has {len(ids)} tokens, less than one row of {length}: give more text or a "
            "shorter length"
        )
    ids = ids[: count * length].view(count, length)
    positions = positions[: count * length].view(count, length)

    # `positions` count from the start of the document, which may lie in an earlier row. The column
    # where it starts is column - position; a negative one means an earlier row, so column 0.
    columns = torch.arange(length)
    starts = torch.where(positions <= columns, columns - positions, 0)
    positions = columns - starts.cummax(1).values

    mask = getattr(tokenizer, "mask_token_id", None)
    special = tuple(getattr(tokenizer, "all_special_ids", ()))
    return Packed(ids, positions, count_bytes(ids, tokenizer), mask, special)


def long_windows(documents: list[str], tokenizer: Any, length: int) -> Packed:
    """Rows of `length` tokens that each lie inside one document.

    Shorter documents and remainders are left out. RegraftError when no document is long enough.
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

    ids = torch.tensor(rows)  # (rows, length)
    # contiguous: rows of an expanded tensor would share their memory
    positions = torch.arange(length).expand_as(ids).contiguous()
    return Packed(ids, positions, count_bytes(ids, tokenizer))


def shuffled_indices(rows: int, count: int, seed: int) -> Tensor:
    """`count` row numbers in a seeded order: whole passes over the rows, each shuffled anew.

    Args:
        rows: how many rows there are to choose from.
        count: how many numbers to return; more than `rows` repeats rows, but none before all
            others have come as often.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(passes)[:count]
