"""Linear recurrences with a decay per key dimension: one token at a time, and in chunks.

Shapes as in `recurrence`, but g is (batch, heads, time, dim). `bonus` (heads, dim) is RWKV's extra
weight of the current token. Everything is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.shapes import Bool, Float, Int
from .recurrence import CHUNK, carry_plain, chunk_ids, document_masks, initial_state
from .tensors import pad_time

PAIRS = CHUNK * (CHUNK - 1) // 2  # of a query and an earlier key, in a chunk


def naive_vector(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time dim"],
    bonus: Float[Tensor, "heads dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
) -> tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]:
    """The recurrence as the papers write it: (outputs, last state).

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T. Without bonus o_t = S_t^T q_t (gated linear attention,
    arXiv 2312.06635, eq. 3); with it o_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t (RWKV-6, arXiv
    2404.05892, eqs. 18-19). Arguments as in `recurrence.naive_recurrence`.
    """
    S, outputs = initial_state(k, v, state), []
    q = q.unflatten(1, (k.shape[1], -1))  # (b, h, group, t, d)

    for t in range(k.shape[2]):
        if segments is not None and t > 0:
            S = S * (segments[:, t] == segments[:, t - 1]).view(-1, 1, 1, 1)

        # With a bonus the output reads the state before the write: the bonus stands for the
        # current token's weight, which is otherwise one.
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        before, S = S, S * g[:, :, t, :, None].exp() + write
        seen = S if bonus is None else before + bonus.unsqueeze(-1) * write
        outputs.append(q[:, :, :, t] @ seen)
    return torch.stack(outputs, dim=3).flatten(1, 2), S


def chunked_vector(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time dim"],
    bonus: Float[Tensor, "heads dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]:
    """`naive_vector` in chunks of `chunk` tokens, a power of two; the other arguments are the same.

    Blocks of 1, 2, 4, ... tokens are joined in pairs: the queries of the second read the keys of
    the first, each decayed to the boundary between them. All exponents are sums of log-decays, so
    that nothing overflows or cancels, however strong they are (the factored form of arXiv
    2312.06635, section 4.3, divides by decays).
    """
    time, n, heads = q.shape[2], -(-q.shape[2] // chunk), k.shape[1]
    S = initial_state(k, v, state)
    q, k, v, g = (pad_time(x, chunk).unflatten(2, (n, chunk)) for x in (q, k, v, g))
    q = q.unflatten(1, (heads, -1)).movedim(2, 4)  # (b, h, n, c, group, d)
    ids = None if segments is None else chunk_ids(segments, n, chunk)

    # A token's own key, which no decay lies before: (b, h, n, c, group, e).
    weighed = k if bonus is None else bonus[:, None, None] * k
    out = (q * weighed.unsqueeze(-2)).sum(-1, keepdim=True) * v.unsqueeze(-2)

    # Log-decays from a block's start to a query, from a key to its block's end, of the whole block.
    # With a bonus a query reads the state before its own token's decay.
    reach, into, whole = g if bonus is None else torch.zeros_like(g), torch.zeros_like(g), g
    half = 1
    while half < chunk:
        (k0, _), (v0, _), (_, q1) = (_split_halves(x, half) for x in (k, v, q))
        (r0, r1), (i0, i1) = (_split_halves(x, half) for x in (reach, into))
        w0, w1 = _split_halves(whole, 1)  # (b, h, n, pairs, 1, d)

        # What the second block of each pair reads from the first.
        scores = (q1 * r1.exp().unsqueeze(-2)).flatten(-3, -2) @ (k0 * i0.exp()).mT
        if ids is not None:
            scores = scores * _same_document(ids, half).repeat_interleave(q.shape[4], -2)
        read = (scores @ v0).unflatten(-2, (half, -1))  # (b, h, n, pairs, half, group, e)
        out = out + _join_halves(torch.zeros_like(read), read)

        # The pairs become the blocks of the next round.
        reach, into = _join_halves(r0, r1 + w0), _join_halves(i0 + w1, i1)
        whole = (w0 + w1).squeeze(4)
        half *= 2

    # Between chunks, whose blocks now span them: (b, h, n, c, d) for reach and into.
    reads, writes, keeps = (
        mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
        for mask in document_masks(segments, n, chunk)
    )
    keep = (whole.squeeze(3).exp() * keeps).unsqueeze(-1)
    carried, last = carry_plain(keep, (k * into.exp() * writes).mT @ v, S)
    from_state = (q * (reach.exp() * reads).unsqueeze(-2)).flatten(3, 4) @ carried
    out = out + from_state.unflatten(3, (chunk, -1))
    return out.movedim(4, 2).flatten(1, 2).flatten(2, 3)[:, :, :time], last


def _same_document(
    ids: Int[Tensor, "batch chunks chunk"], half: int
) -> Bool[Tensor, "batch 1 chunks pairs half half"]:
    """Whether a token of a pair's second block is of the document of one of its first block."""
    first, second = _split_halves(ids.unsqueeze(1), half)
    return second.unsqueeze(-1) == first.unsqueeze(-2)


def _split_halves(
    x: Float[Tensor, "b h n c ..."] | Int[Tensor, "b 1 n c"], half: int
) -> tuple[Tensor, Tensor]:
    """First and second block of each pair, both (b, h, n, pairs, half, ...)."""
    first, second = x.unflatten(3, (-1, 2, half)).unbind(4)
    return first, second


def _join_halves(
    first: Float[Tensor, "b h n pairs half ..."], second: Float[Tensor, "b h n pairs half ..."]
) -> Float[Tensor, "b h n c ..."]:
    """The inverse of `_split_halves`."""
    return torch.stack((first, second), 4).flatten(3, 5)
