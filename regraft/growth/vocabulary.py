"""More rows of a vocabulary: what the new rows of embeddings, heads and their biases hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..core.anatomy import PlacedPart
from ..core.checkpoint import Holds, LazyTensor, Provenance
from ..core.shapes import Float
from .tensor import compute_dtype

# What a new row holds: the mean of the rows of the pieces that its token replaces (of all rows
# where it replaces none), the mean of all rows, or zeros.
VocabInit = Literal["pieces", "mean", "zero"]
VOCAB_INITS: tuple[VocabInit, ...] = ("pieces", "mean", "zero")
WORDS = {
    "pieces": "the mean of their pieces' rows",
    "mean": "the mean of all rows",
    "zero": "zeros",
}


@dataclass(frozen=True)
class VocabRows:
    """The rows that a larger vocabulary has beside the old ones."""

    # Rows of the source and of the target.
    old: int
    new: int
    # What new rows hold.
    init: VocabInit
    # Row of an added token -> rows of the source whose mean it holds; it may lie below `old`, in
    # padding that no token had. Empty: it holds what padding holds.
    pieces: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def overwritten(self) -> list[int]:
        """Rows of the source that added tokens take."""
        return sorted(row for row in self.pieces if row < self.old)


def grow_rows(lazy: LazyTensor, target: PlacedPart, rows: VocabRows, holds: Holds) -> LazyTensor:
    """A tensor with the rows of a larger vocabulary; the same one where it has no such axis.

    Args:
        lazy: as stored.
        target: the parameter in the larger model.
        rows: the new ones.
        holds: what the tensor is, weights or moments of them.
    """
    dims = target.part.axes.dims(target.part.stored)
    if (("vocab",),) not in dims:
        return lazy
    axis = dims.index((("vocab",),))

    def compute() -> Float[Tensor, "*stored"]:
        value = lazy.read().movedim(axis, 0)
        return extend_rows(value, rows, holds).movedim(0, axis).contiguous()

    note = f"{rows.new - rows.old} rows more, {WORDS[rows.init]}"
    provenance = Provenance("grown", lazy.provenance.sources, note)
    return replace(lazy, shape=target.shape, provenance=provenance, read=compute)


def extend_rows(
    value: Float[Tensor, "old ..."], rows: VocabRows, holds: Holds = "weights"
) -> Float[Tensor, "new ..."]:
    """Old rows in front and bit for bit, new ones behind them.

    With the mean of all rows in the head (and of all biases) a new logit is the mean of the old
    ones. It is never the largest, and by Jensen's inequality n new tokens beside V old ones take at
    most n / (V + n) of the probability (Hewitt, "Initializing New Word Embeddings for Pretrained
    Language Models", 2021). The same holds for pieces with their logits.

    Args:
        value: a table, a head or its bias, one row per token.
        rows: the new ones.
        holds: weights, or a moment of Adam: the first begins at zero, the second at its mean.
    """
    dtype = compute_dtype(value.dtype)
    if holds == "weights" and rows.init != "zero":
        fill = value.mean(0, dtype=dtype)
    else:
        fill = torch.zeros(value.shape[1:], dtype=dtype)
        if holds == "exp_avg_sq":
            fill += value.mean(dtype=dtype)

    out = value.new_empty((rows.new, *value.shape[1:]))
    out[: rows.old] = value
    out[rows.old :] = fill.to(value.dtype)
    takes_pieces = holds == "weights" and rows.init == "pieces"
    for row, pieces in rows.pieces.items():
        own = value[list(pieces)].mean(0, dtype=dtype) if pieces and takes_pieces else fill
        out[row] = own.to(value.dtype)
    return out


def describe_rows(rows: VocabRows, has_head: bool) -> list[str]:
    """What a person should know of new rows: what they hold, and what their logits are.

    Args:
        rows: the new ones.
        has_head: whether the model has logits over the vocabulary.
    """
    notes = []
    padding = set(range(rows.old, rows.new)) - set(rows.pieces)
    kinds: list[tuple[int, str, str]] = [
        (len(rows.pieces), f"{len(rows.pieces)} added tokens", rows.init),
        (len(padding), f"{len(padding)} padding rows", "zero" if rows.init == "zero" else "mean"),
    ]
    for count, what, init in kinds:
        if count:
            notes.append(f"{what}: {WORDS[init]}{LOGITS[init] if has_head else ''}")
    if rows.overwritten:
        notes.append(
            f"{len(rows.overwritten)} added tokens take rows of the source that no token had, from"
            f" {rows.overwritten[0]} on: the logits of these rows change"
        )
    return notes


LOGITS = {
    "pieces": ", so a new logit is the mean of its pieces' logits and never the largest",
    "mean": ", so a new logit is the mean of the old logits and never the largest",
    "zero": ", so a new logit is 0, which may be the largest",
}
