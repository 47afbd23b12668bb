"""Which form of a recurrence runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.shapes import Float, Int
from .kernels import try_fused_kernel
from .recurrence import chunked_recurrence, step_recurrence
from .tensors import is_writable
from .vector import chunked_vector, naive_vector


def recur(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time"] | Float[Tensor, "batch heads time dim"],
    beta: Float[Tensor, "batch heads time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
    bonus: Float[Tensor, "heads dim"] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]:
    """(outputs, last state) of `recurrence.naive_recurrence` or `vector.naive_vector`.

    One token runs as written, or in place. Many run in a fused kernel on a GPU where one fits, else
    in chunks.

    Args:
        g: log-decay; its number of axes chooses between one decay per head and one per key
            dimension.
        dtype: of q, k and v in the fused kernel.
        overwrite: whether one token may write its state where the old one was.
    The others are as in `recurrence.naive_recurrence` and `vector.naive_vector`.
    """
    one_token = q.shape[2] == 1
    if not one_token:
        result = try_fused_kernel(q, k, v, g, beta, segments, state, bonus, dtype)
        if result is not None:
            return result

    if g.ndim == 4:
        vector_form = naive_vector if one_token else chunked_vector
        return vector_form(q, k, v, g, bonus, segments, state)
    if one_token:
        return step_recurrence(q, k, v, g, beta, state, overwrite and is_writable(state))
    return chunked_recurrence(q, k, v, g, beta, segments, state)
