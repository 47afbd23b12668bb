"""Which form of a recurrence runs."""

from __future__ import annotations

from torch import Tensor

from .recurrence import chunked, naive


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of `recurrence.naive`: as written for one token, in chunks for many."""
    run = naive if q.shape[2] == 1 else chunked
    return run(q, k, v, g, beta, segments, state)
