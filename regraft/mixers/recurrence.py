"""Linear recurrences over a matrix state: one token at a time, in chunks, and what they cost.

Shapes: q (batch, heads * group, time, dim), k (batch, heads, time, dim), v (batch, heads, time,
value dim), log-decay g and write strength beta (batch, heads, time), state (batch, heads, dim,
value dim). `group` queries read one state. `segments` (batch, time) numbers the documents of a
packed row; the state starts from zero at each. Everything is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.shapes import Float, Int
from .tensors import pad_time

CHUNK = 64  # tokens


def initial_state(
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    state: Float[Tensor, "batch heads dim values"] | None,
) -> Float[Tensor, "batch heads dim values"]:
    """The state, or zeros of the size for these keys and values."""
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state


def naive_recurrence(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time"],
    beta: Float[Tensor, "batch heads time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
) -> tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]:
    """The recurrence as the papers write it: (outputs, last state).

    Without beta: S_t = exp(g_t) S_{t-1} + k_t v_t^T (decayed linear attention; SUPRA, arXiv
    2405.06640, eq. 10). With beta, the gated delta rule (arXiv 2412.06464, eq. 10), which replaces
    the value already stored under k_t: S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T
    exp(g_t) k_t)^T. In both, o_t = S_t^T q_t.

    Args:
        q: queries; each group of `queries / heads` in a row reads one state.
        k: keys.
        v: values.
        g: logarithm of the decay, at most 0.
        beta: write strength in [0, 1] of the delta rule; None: no delta rule.
        segments: document number of every token; the state starts from zero at each document.
        state: the state before the first token; None: zeros.
    """
    S, outputs = initial_state(k, v, state), []
    q = q.unflatten(1, (k.shape[1], -1))  # (b, h, group, t, d)

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


def step_recurrence(
    q: Float[Tensor, "batch queries 1 dim"],
    k: Float[Tensor, "batch heads 1 dim"],
    v: Float[Tensor, "batch heads 1 values"],
    g: Float[Tensor, "batch heads 1"],
    beta: Float[Tensor, "batch heads 1"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
    overwrite: bool = False,
) -> tuple[Float[Tensor, "batch queries 1 values"], Float[Tensor, "batch heads dim values"]]:
    """`naive_recurrence` of one token, in few calls and few passes over the state.

    Args:
        overwrite: write the new state where the old one was.
    The others are as in `naive_recurrence`.
    """
    S, decay = initial_state(k, v, state), g.exp().unsqueeze(-1)
    q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, h, group, d)

    # Keys and queries read the state before the token; what it writes is added to the outputs.
    read = decay * (torch.cat((k, q), 2) @ S)
    write = v if beta is None else beta.unsqueeze(-1) * (v - read[:, :, :1])
    out = read[:, :, 1:] + (q * k).sum(-1, keepdim=True) * write
    if overwrite:
        S.mul_(decay).addcmul_(k.mT, write)
    else:
        S = torch.addcmul(S * decay, k.mT, write)
    return out.flatten(1, 2).unsqueeze(2), S


def chunked_recurrence(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time"],
    beta: Float[Tensor, "batch heads time"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads dim values"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]:
    """`naive_recurrence` in chunks of `chunk` tokens; the other arguments are the same.

    Matrix products inside a chunk, one small product per chunk to carry the state. Within a chunk
    the delta rule's writes solve a unit triangular system (the WY form, arXiv 2406.06484, section
    3), so a chunk maps the state affinely, S -> A S + B, and only that map is applied in sequence.
    """
    time, n, heads = q.shape[2], -(-q.shape[2] // chunk), k.shape[1]
    S = initial_state(k, v, state)
    # Contiguous once: each product would copy its operands again.
    q, k, v, g = (pad_time(x, chunk).contiguous().unflatten(2, (n, chunk)) for x in (q, k, v, g))
    q = q.unflatten(1, (heads, -1)).transpose(2, 3)  # (b, h, n, group, c, d)

    # Decay from a key to a later query of the same chunk and document, zero for other pairs.
    total = g.cumsum(-1)  # (b, h, n, c): log-decay from the chunk's start
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    reads, writes, keeps = document_masks(segments, n, chunk)
    if segments is not None:
        ids = chunk_ids(segments, n, chunk)
        causal = causal & (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1)
    # Masked before exp: a decay against time is a positive exponent, which may overflow.
    decay = decay.masked_fill(~causal, -torch.inf).exp()
    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * decay.unsqueeze(3)

    # Between chunks: what reads the carried state, what is added to it, what it keeps.
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
        # The writes of a chunk are fixed - against @ S, with S the state before the chunk.
        fixed, against = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
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
    """(forward, backward) FLOPs of `chunked_recurrence` on one row, from an empty state.

    Triangular solves are not counted, as in PyTorch's counter; of their backward pass the product
    for the matrix is.

    Args:
        states: heads that have a state.
        group: query heads that read one state.
        keys: width of queries and keys.
        values: width of values.
        length: tokens in the row.
        delta: whether the delta rule is used.
        pairs: of queries and keys that are scored in a chunk.
    """
    n = -(-length // CHUNK)

    # Forward pass of one chunk; `outer` is both what goes into the state and what is read from it.
    scores, mixed = 2 * pairs * keys, 2 * pairs * values
    outer = 2 * CHUNK * keys * values
    square = 2 * CHUNK * keys**2
    carry = 2 * keys**2 * values
    reads = group * outer
    inner = group * (scores + mixed)

    # With one chunk the state is a constant, and what goes into the next one is not used.
    carried = 2 if n > 1 else 1
    forward, backward = n * (inner + reads), n * (2 * inner + carried * reads)
    if not delta:
        return states * (forward + n * outer), states * (backward + (2 * n * outer if n > 1 else 0))

    forward += n * (scores + 2 * outer + square + carry)
    # Twice for k k^T, and the product in the backward pass of the solve.
    backward += n * (2 * scores + scores + mixed + carried * outer)
    backward += n * 2 * (outer + square) + (2 * n - 3) * carry if n > 1 else 0
    return states * forward, states * backward


def chunk_ids(
    segments: Int[Tensor, "batch time"], n: int, chunk: int
) -> Int[Tensor, "batch chunks chunk"]:
    """Document numbers in `n` chunks of `chunk` tokens.

    The tail repeats the last document: its padded writes are zero.
    """
    tail = segments[:, -1:].expand(-1, n * chunk - segments.shape[1])
    return torch.cat((segments, tail), dim=1).unflatten(1, (n, chunk))


def document_masks(
    segments: Int[Tensor, "batch time"] | None, n: int, chunk: int
) -> tuple[
    Float[Tensor, "batch 1 chunks chunk"] | float,
    Float[Tensor, "batch 1 chunks chunk"] | float,
    Float[Tensor, "batch 1 chunks"] | float,
]:
    """Which tokens read the carried state, which write to it, and which chunks keep it: 0 or 1."""
    if segments is None:
        return 1.0, 1.0, 1.0

    # The carried state belongs to the document of the last token before the chunk.
    ids = chunk_ids(segments, n, chunk)
    last = ids[:, :, -1]
    before = torch.cat((ids[:, :1, 0], last[:, :-1]), dim=1)

    reads = (ids == before.unsqueeze(-1)).unsqueeze(1).float()
    writes = (ids == last.unsqueeze(-1)).unsqueeze(1).float()
    keeps = (before == last).unsqueeze(1).float()
    return reads, writes, keeps


def carry_plain(
    keep: Float[Tensor, "batch heads chunks #dim #values"],
    add: Float[Tensor, "batch heads chunks dim values"],
    S: Float[Tensor, "batch heads dim values"],
) -> tuple[Float[Tensor, "batch heads chunks dim values"], Float[Tensor, "batch heads dim values"]]:
    """States before each chunk, and the last, under S -> keep S + add."""
    states = []
    for i in range(add.shape[2]):
        states.append(S)
        S = keep[:, :, i] * S + add[:, :, i]
    return torch.stack(states, dim=2), S


def _carry_affine(
    keep: Float[Tensor, "batch heads chunks"],
    against: Float[Tensor, "batch heads chunks dim dim"],
    add: Float[Tensor, "batch heads chunks dim values"],
    S: Float[Tensor, "batch heads dim values"],
) -> tuple[Float[Tensor, "batch heads chunks dim values"], Float[Tensor, "batch heads dim values"]]:
    """States before each chunk, and the last, under S -> (keep I - against) S + add."""
    eye = torch.eye(against.shape[-1], device=S.device)
    maps = keep[..., None, None] * eye - against
    states = []
    for i in range(add.shape[2]):
        states.append(S)
        # Without autocast: a state that is rounded to bfloat16 at every chunk forgets.
        with torch.autocast(S.device.type, enabled=False):
            S = maps[:, :, i].float() @ S + add[:, :, i]
    return torch.stack(states, dim=2), S
