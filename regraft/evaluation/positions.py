"""Perplexity by position in long documents: whether more context still helps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import chunked
from .rows import PositionBucket

FIRST = 64  # tokens of context in the first bucket


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges [from, to) of context lengths: 0-64, 64-128, 128-256, ... up to `length`."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(FIRST, 2 * edges[-1]), length))
    return list(zip(edges, edges[1:], strict=False))


def perplexity_by_position(model: nn.Module, rows: Tensor) -> list[PositionBucket]:
    """Perplexity of tokens by how much context they have.

    Args:
        model: a causal language model with a cache.
        rows: token ids, (documents, length).
    """
    nll = torch.stack([row_nll(model, row) for row in rows]).double()  # (documents, length - 1)

    table: list[PositionBucket] = []
    for start, end in buckets(rows.shape[1]):
        # Column i is of token i + 1, which has i + 1 tokens of context. Token 0 has none.
        means = nll[:, max(start, 1) - 1 : end - 1].mean(1)  # (documents,)
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
        table.append(
            {
                "from": start,
                "to": end,
                "perplexity": math.exp(means.mean()),
                "stderr": error,
                "tokens": len(rows) * (end - max(start, 1)),
            }
        )
    return table


def row_nll(model: nn.Module, row: Tensor) -> Tensor:
    """row: (length,) -> negative log-likelihoods (length - 1,) of all tokens but the first."""
    parts, done = [], 0
    for logits, _ in chunked.forward_in_chunks(model, row[None, :-1]):
        targets = row[None, done + 1 : done + 1 + logits.shape[1]]
        parts.append(-chunked.log_likelihoods(logits, targets)[0].cpu())
        done += logits.shape[1]
    return torch.cat(parts)
