"""Which form of a recurrence runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import try_fused_kernel
from .recurrence import chunked_recurrence, naive_recurrence
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
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of `recurrence.naive`, or of `vector.naive_vector` for a decay per key dimension: as
    written for one token; for many in a kernel on a GPU, which takes q, k and v as `dtype`, else in chunks.
    """
    one = q.shape[2] == 1
    if (
        not one
        and (found := try_fused_kernel(q, k, v, g, beta, segments, state, bonus, dtype)) is not None
    ):
        return found
    if g.ndim == 4:
        return (naive_vector if one else chunked_vector)(q, k, v, g, bonus, segments, state)
    return (naive_recurrence if one else chunked_recurrence)(q, k, v, g, beta, segments, state)
