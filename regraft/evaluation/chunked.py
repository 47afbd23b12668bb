"""Long rows read through the cache in chunks: memory linear in their length, for every model with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import modeling

CHUNK = 1024


@torch.no_grad()
def forward_in_chunks(
    model: nn.Module, ids: Tensor, cache: Any = None, keep: int = 0
) -> Iterator[tuple[Tensor, Any]]:
    """ids: (rows, time) -> (logits (rows, chunk or `keep`, vocab), cache) after every chunk of 1,024 tokens.

    `keep`: logits of the last so many positions only, 0 for all. A given `cache` is read on from, and changed.
    """
    device = next(model.parameters()).device
    for part in ids.to(device).split(CHUNK, dim=1):
        out = model(part, **modeling.cache_kwargs(cache), use_cache=True, logits_to_keep=keep)
        cache = modeling.cache_of(out)
        yield out.logits, cache


def last_logits(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """(logits of the last position (rows, vocab), cache) after ids: (rows, time)."""
    *_, (logits, after) = forward_in_chunks(model, ids, cache, keep=1)
    return logits[:, -1], after


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (..., vocab), targets (...) -> log p(target) in float32, (...)."""
    targets = targets.to(logits.device)
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
