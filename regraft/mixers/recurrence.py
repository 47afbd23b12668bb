"""Linear recurrences over a matrix state: the equations one token at a time, and the same in chunks.

Shapes: q (batch, heads * group, time, dim), k (batch, heads, time, dim), v (batch, heads, time, value dim), log-decay
g and write strength beta (batch, heads, time), state (batch, heads, dim, value dim). `group` queries read one state.
`segments` (batch, time) numbers the documents of a packed row; the state starts from zero at each. Everything is
computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import pad_time

CHUNK = 64


def initial_state(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The state, or the empty one for these keys and values."""
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state


def naive_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as the papers write it; returns outputs (batch, heads * group, time, value dim) and the last
    state.

    Without beta: S_t = exp(g_t) S_{t-1} + k_t v_t^T (decayed linear attention; SUPRA, arXiv 2405.06640, eq. 10).
    With beta, the gated delta rule (arXiv 2412.06464, eq. 10): the value already stored under k_t is replaced,
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T exp(g_t) k_t)^T. In both, o_t = S_t^T q_t.
    """
    S, outputs = initial_state(k, v, state), []
    q = q.unflatten(1, (k.shape[1], -1))
    for t in range(k.shape[2]):
        if segments is not None and t > 0:
            S = S * (segments[:, t] == segments[:, t - 1]).view(-1, 1, 1, 1)
        S = S * g[:, :, t, None, None].exp()
        write = v[:, :, t]
        if beta is not None:
            write = beta[:, :, t, None] * (write - torch.einsum("bhd,bhde->bhe", k[:, :, t], S))
        S = S + k[:, :, t, :, None] * write[:, :, None, :]
        outputs.append(q[:, :, :, t] @ S)
    return torch.stack(outputs, dim=3).flatten(1, 2), S


def chunked_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`naive` in chunks: matrix products inside a chunk, one small product per chunk to carry the state.

    Within a chunk the delta rule's writes solve a unit triangular system (the WY form, arXiv 2406.06484, section 3), so
    a chunk maps the state affinely, S -> A S + B, and only that map is applied in sequence.
    """
    time, n, heads = q.shape[2], -(-q.shape[2] // chunk), k.shape[1]
    S = initial_state(k, v, state)
    q, k, v, g = (pad_time(x, chunk).unflatten(2, (n, chunk)) for x in (q, k, v, g))
    q = q.unflatten(1, (heads, -1)).transpose(2, 3)  # (b, h, n, group, c, d)
    total = g.cumsum(-1)  # (b, h, n, c): log-decay from the chunk's start
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    reads, writes, keeps = document_masks(segments, n, chunk)
    if segments is not None:
        ids = chunk_ids(segments, n, chunk)
        causal = causal & (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1)
    decay = decay.masked_fill(~causal, -torch.inf).exp()
    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * decay.unsqueeze(3)
    from_state = (total.exp() * reads).unsqueeze(-1)
    to_state = (total[..., -1:] - total).exp() * writes
    keep = total[..., -1].exp() * keeps
    k_out = (k * to_state.unsqueeze(-1)).mT
    if beta is None:
        carried, last = carry_plain(keep[..., None, None], k_out @ v, S)
        written = v
    else:
        strength = pad_time(beta, chunk).unflatten(2, (n, chunk)).unsqueeze(-1)
        inner = strength * (k @ k.mT) * decay
        right = torch.cat((strength * v, strength * from_state * k), dim=-1)
        solved = torch.linalg.solve_triangular(inner, right, upper=False, unitriangular=True)
        fixed, against = solved.split(
            (v.shape[-1], k.shape[-1]), dim=-1
        )  # writes = fixed - against @ S
        carried, last = _carry_affine(keep, k_out @ against, k_out @ fixed, S)
        written = fixed - against @ carried
    q_in = q * from_state.unsqueeze(3)
    out = scores.flatten(3, 4) @ written + q_in.flatten(3, 4) @ carried
    out = out.unflatten(3, q.shape[3:5]).transpose(2, 3).flatten(1, 2)  # (b, h * group, n, c, e)
    return out.flatten(2, 3)[:, :, :time], last


def chunked_flops(
    states: int,
    group: int,
    keys: int,
    values: int,
    length: int,
    delta: bool,
    pairs: int = CHUNK * CHUNK,
) -> tuple[int, int]:
    """(forward, backward) FLOPs of `chunked` on one row, from an empty state of (keys, values) numbers.

    `pairs` of queries and keys are scored in a chunk.
    Triangular solves are not counted, as in PyTorch's counter; of their backward pass the product for the matrix is.
    """
    n = -(-length // CHUNK)
    scores, mixed = 2 * pairs * keys, 2 * pairs * values  # per chunk
    outer, square, carry = (
        2 * CHUNK * keys * values,
        2 * CHUNK * keys**2,
        2 * keys**2 * values,
    )  # outer: to, from state
    reads = group * outer
    inner = group * (scores + mixed)
    carried = (
        2 if n > 1 else 1
    )  # with one chunk the state is a constant, and what goes into the next is not used
    once, back = n * (inner + reads), n * (2 * inner + carried * reads)
    if not delta:
        return states * (once + n * outer), states * (back + (2 * n * outer if n > 1 else 0))
    once += n * (scores + 2 * outer + square + carry)
    back += n * (
        2 * scores + scores + mixed + carried * outer
    )  # twice for k k^T, and the solve's own
    back += n * 2 * (outer + square) + (2 * n - 3) * carry if n > 1 else 0
    return states * once, states * back


def chunk_ids(segments: Tensor, n: int, chunk: int) -> Tensor:
    """Document numbers as (batch, chunks, chunk); the tail repeats the last document, whose padded writes are zero."""
    tail = segments[:, -1:].expand(-1, n * chunk - segments.shape[1])
    return torch.cat((segments, tail), dim=1).unflatten(1, (n, chunk))


def document_masks(
    segments: Tensor | None, n: int, chunk: int
) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Which tokens may read the carried state, which write to it, and which chunks keep it: 0/1, over heads alike."""
    if segments is None:
        return 1.0, 1.0, 1.0
    ids = chunk_ids(segments, n, chunk)
    last = ids[:, :, -1]
    before = torch.cat((ids[:, :1, 0], last[:, :-1]), dim=1)
    reads = (ids == before.unsqueeze(-1)).unsqueeze(1).float()
    return (
        reads,
        (ids == last.unsqueeze(-1)).unsqueeze(1).float(),
        (before == last).unsqueeze(1).float(),
    )


def carry_plain(keep: Tensor, add: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk, S -> keep S + add, and the last; add: (batch, heads, chunks, dim, value dim)."""
    states = []
    for i in range(add.shape[2]):
        states.append(S)
        S = keep[:, :, i] * S + add[:, :, i]
    return torch.stack(states, dim=2), S


def _carry_affine(keep: Tensor, against: Tensor, add: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(against.shape[-1], device=S.device)
    maps = keep[..., None, None] * eye - against
    states = []
    for i in range(add.shape[2]):
        states.append(S)
        with torch.autocast(
            S.device.type, enabled=False
        ):  # a state that is rounded at every chunk forgets
            S = maps[:, :, i].float() @ S + add[:, :, i]
    return torch.stack(states, dim=2), S
