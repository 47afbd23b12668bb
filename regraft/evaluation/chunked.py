"""Long rows read through the cache in chunks, which takes memory linear in their length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import modeling

CHUNK = 1024  # tokens of a forward pass


@torch.no_grad()
def forward_in_chunks(
    model: nn.Module, ids: Tensor, cache: Any = None, keep: int = 0
) -> Iterator[tuple[Tensor, Any]]:
    """Read rows chunk by chunk; (logits (rows, chunk or `keep`, vocab), cache) after each chunk.

    Args:
        model: a causal language model with a cache.
        ids: (rows, time).
        cache: what was read before; it is changed.
        keep: positions at the end of a chunk whose logits are computed, 0 for all.
    """
    device = next(model.parameters()).device
    for part in ids.to(device).split(CHUNK, dim=1):
        out = model(part, **modeling.cache_kwargs(cache), use_cache=True, logits_to_keep=keep)
        cache = modeling.cache_of(out)
        yield out.logits, cache


def last_logits(model: nn.Module, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Read ids (rows, time); (logits of the last position (rows, vocab), cache)."""
    *_, (logits, after) = forward_in_chunks(model, ids, cache, keep=1)
    return logits[:, -1], after


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (..., vocab), targets (...) -> log p(target) in float32, (...)."""
    targets = targets.to(logits.device)
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
