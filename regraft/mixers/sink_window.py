"""Sliding-window softmax attention with a learned sink per head, as GraniteSWA computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.shapes import Float, Int
from .attention import Attention
from .latent import refuse_latent
from .naive_window import naive_scores
from .weight_spec import WeightSpec
from .window import Window

SHUT = -1e4  # logit of a sink that takes nothing; bfloat16 and float16 hold it


@dataclass(frozen=True)
class SinkWindowOptions:
    """What a token sees."""

    window: int = 64  # the last tokens, the token itself included
    # No first tokens: the learned sink stands for them.
    sinks: ClassVar[int] = 0


def naive_sink_window(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch kv time dim"],
    v: Float[Tensor, "batch kv time dim"],
    attention: Attention,
    window: int,
    sinks: Float[Tensor, " heads"],
    position: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch heads time dim"]:
    """o_i = sum_j e^(s_ij) v_j / (e^sink + sum_j e^(s_ij)) over the last `window` tokens j.

    Args:
        sinks: logit of each head's sink.
        q, k, v, attention, window, position, segments: as of `naive_window`.
    """
    scores = naive_scores(q, k, attention, window, 0, position, segments).float()
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weight = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weight.to(v.dtype) @ v.repeat_interleave(attention.group, 1)


class SinkWindow(Window):
    """Sliding window with a learned sink per head (GraniteSWA; gpt-oss, arXiv 2508.10925).

    The sink is one more logit in the softmax that brings no value: it takes weight from the window.
    All projections have biases, in which calibration keeps the value of a text's first token
    (`train.sinks`). As converted, the sinks take nothing and new biases are zero: a plain window.
    """

    name = "sink_window"
    Options = SinkWindowOptions
    begins_with_bos = True

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(replace(attention, qkv_bias=True, o_bias=True), spec, output)
        self.sinks = nn.Parameter(torch.full((attention.heads,), SHUT))

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections, biases of zero where it has none, and the sinks."""
        why = "it keeps a text's first value in the biases of values: use --mixer window --sinks 4"
        refuse_latent(attention, "'sink_window'", why)
        there = super().weights(attention, spec, output)
        wanted = super().weights(replace(attention, qkv_bias=True, o_bias=True), spec, output)
        table = {
            name: weight if name in there else replace(weight, source=None, fresh="zeros")
            for name, weight in wanted.items()
        }
        shut = WeightSpec("-> kv group", fresh=f"constant {SHUT:g}", decay=False)
        return {"sinks": shut} | table
