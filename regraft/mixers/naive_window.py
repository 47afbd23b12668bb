"""Softmax attention within a window as one mask over all pairs, the reference of `window`."""

from __future__ import annotations

from torch import Tensor, finfo

from ..core.shapes import Float, Int
from .attention import Attention

EMPTY = -1  # position of padding and of unused slots in a state


def naive_window(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch kv time dim"],
    v: Float[Tensor, "batch kv time value"],
    attention: Attention,
    window: int,
    sinks: int,
    position: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch heads time value"]:
    """Softmax attention under a mask of all pairs (attention sinks, arXiv 2309.17453).

    Args:
        q, k, v: queries, keys and values, already rotated.
        attention: scales and caps the logits.
        window, sinks: as in `WindowOptions`.
        position: of each token in its document, EMPTY on padding.
        segments: document number of each token.
    """
    scores = naive_scores(q, k, attention, window, sinks, position, segments)
    return scores.softmax(-1) @ v.repeat_interleave(attention.group, 1)


def naive_scores(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch kv time dim"],
    attention: Attention,
    window: int,
    sinks: int,
    position: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch heads time keys"]:
    """Logits of all pairs, the smallest number where a query does not see a key.

    Arguments as of `naive_window`.
    """
    # one row per query, one column per key
    distance = position.unsqueeze(-1) - position.unsqueeze(-2)
    seen = (distance >= 0) & ((distance < window) | (position.unsqueeze(-2) < sinks))
    seen &= (segments.unsqueeze(-1) == segments.unsqueeze(-2)) & (position.unsqueeze(-2) > EMPTY)

    products = q @ k.repeat_interleave(attention.group, 1).transpose(-1, -2)
    scores = attention.scale_scores(products, distance.unsqueeze(1))
    return scores.masked_fill(~seen.unsqueeze(1), finfo(q.dtype).min)
