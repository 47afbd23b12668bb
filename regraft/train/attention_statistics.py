"""What each head of the teacher attends to and gives, recomputed from the projections that a mixer
inherits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers.base import Mixer
from .hooks import LayerRecord


@dataclass
class AttentionStatistics:
    """One teacher layer on one batch: what each head attends to and what it reads; float32."""

    heads: Tensor  # (batch, heads, time, dim): the teacher's per-head outputs
    outside: Tensor  # (batch, heads, time): attention mass beyond the window and sinks
    distance: Tensor  # (batch, heads, time): distance summed over that mass
    entropy: Tensor  # (batch, heads, time): attention entropy over log(tokens seen)


Records = Sequence[tuple[LayerRecord, AttentionStatistics]]


def compute_attention_statistics(
    mixer: Mixer, record: LayerRecord, segments: Tensor | None, window: int, sinks: int
) -> AttentionStatistics:
    """Softmax attention from the mixer's inherited projections.

    The projections must still be the teacher's: nothing folded or trained.

    Args:
        mixer: a mixer with the teacher's q, k and v.
        record: what the teacher's attention got.
        segments: (batch, time) number of the document of each token; None: one document a row.
        window: tokens that the mixer's window sees, 0 for none.
        sinks: first tokens of each document that it always sees.
    """
    q, k, v = mixer.qkv(record.inputs)  # (batch, heads or kv heads, time, dim)
    q, k = mixer.rotate(q, k, record.rotary)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))

    time = q.shape[2]
    index = torch.arange(time, device=q.device)
    distance = index.unsqueeze(-1) - index  # (query, key)
    seen = (distance >= 0).unsqueeze(0)
    start = torch.zeros(q.shape[0], time, dtype=torch.long, device=q.device)
    if segments is not None:
        seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
        start = seen.long().argmax(-1)  # the first key seen: where the query's document begins

    scores = mixer.attention.scale_scores(q @ k.transpose(-1, -2), distance[None, None])
    weight = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    is_far = (distance >= window) & ((index - start.unsqueeze(-1)) >= sinks)
    far = is_far.unsqueeze(1) * weight

    # A token that sees only itself has entropy 0: log 2 instead of log 1 avoids dividing by 0.
    count = (index - start + 1).clamp(min=2).unsqueeze(1)
    entropy = -torch.special.xlogy(weight, weight).sum(-1) / count.log()
    return AttentionStatistics(weight @ v, far.sum(-1), (far * distance).sum(-1), entropy)
