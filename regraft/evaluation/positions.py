"""Perplexity by position in long documents: whether more context still helps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import chunked

FIRST = 64


def buckets(length: int) -> list[tuple[int, int]]:
    """[from, to) of context lengths: 0-64, 64-128, 128-256, ... up to `length`."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(FIRST, 2 * edges[-1]), length))
    return list(zip(edges, edges[1:], strict=False))


def perplexity_by_position(model: nn.Module, rows: Tensor) -> list[dict[str, Any]]:
    """rows: (documents, length) -> per bucket `from, to` (tokens of context before the predicted one), `perplexity`,
    `stderr` of its logarithm over documents, `tokens`."""
    nll = torch.stack([row_nll(model, row) for row in rows]).double()
    table = []
    for start, end in buckets(rows.shape[1]):
        means = nll[:, max(start, 1) - 1 : end - 1].mean(1)
        table.append(
            {
                "from": start,
                "to": end,
                "perplexity": math.exp(means.mean()),
                "stderr": means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None,
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
