"""Which form of a recurrence runs."""

from __future__ import annotations

from torch import Tensor

from .recurrence import chunked, naive
from .vector import chunked_vector, naive_vector


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of `recurrence.naive`, or of `vector.naive_vector` for a decay per key dimension: as
    written for one token, in chunks for many.
    """
    one = q.shape[2] == 1
    if g.ndim == 4:
        return (naive_vector if one else chunked_vector)(q, k, v, g, bonus, segments, state)
    return (naive if one else chunked)(q, k, v, g, beta, segments, state)
