"""Gated linear attention: a decay per key dimension, from a low-rank gate or from the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention
from .base import MixerContext
from .decays import start_decays
from .linear import ACTIVATIONS, LinearAttention, LinearOptions, low_rank_weights, mean_decay
from .vector import PAIRS
from .weight_spec import WeightSpec

GATE_TEMPERATURE = 16  # tau of eq. 5: divides the gate's logit


@dataclass(frozen=True)
class GlaOptions(LinearOptions):
    """As `LinearOptions`, and where the decays come from.

    Liger's form is {"gate_from": "keys", "activation": "softmax", "norm": "none", "gate": "none",
    "grouped": true}.
    """

    rotary: bool = False
    norm: Literal["none", "rms", "layer"] = "rms"
    gate: Literal["none", "silu", "sigmoid"] = "silu"
    # Decays from a new low-rank projection of the input, or from the keys without new weights.
    gate_from: Literal["projection", "keys"] = "projection"
    # Of queries and keys.
    activation: Literal["none", "silu", "softmax"] = "none"
    # Of that projection.
    rank: int = 16


class Gla(LinearAttention):
    """GLA (Yang et al., arXiv 2312.06635, section 4).

    S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(dim), with a_t = sigmoid(W_2 W_1 x_t
    + b)^(1/16) per key dimension, W_1 of rank 16; then an RMS norm with gain and a SiLU gate. Liger
    (arXiv 2503.01496) takes a_t = sigmoid(k_t)^(1/16), its pooling of the keys being the identity
    as released, and softmax features of queries and keys, which are not scaled.
    """

    name = "gla"
    Options = GlaOptions
    gain = "dim"
    pairs = PAIRS

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        if self.options.gate_from == "projection":
            self.decay_in = nn.Linear(attention.hidden, self.options.rank, bias=False)
            self.decay_out = nn.Linear(self.options.rank, self.states * attention.dim)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The gate starts constant: half-life about 44 tokens, or the source's ALiBi."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        if options.gate_from == "projection":
            start = start_decays(attention, "sigmoid", "constant 1.25")
            table |= low_rank_weights(
                "decay", options.rank, f"{cls.state_axes(options)} dim", start
            )
        return table

    @torch.no_grad()
    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Half-life = mean distance, as in `gated_deltanet`; decays from keys stay."""
        if self.options.gate_from == "projection":
            rate = mean_decay(distance, self.states).repeat_interleave(self.attention.dim)
            self.decay_out.bias.copy_(-(GATE_TEMPERATURE * rate).expm1().log())

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Queries, keys, values and log-decays, (batch, heads, time, dim)."""
        q, k, v = self.qkv(x)

        # Decays from the keys read them before their activation.
        gate = k
        if self.options.gate_from == "projection":
            gate = self.decay_out(self.decay_in(x)).unflatten(-1, (self.states, -1)).transpose(1, 2)
        g = F.logsigmoid(gate.float()) / GATE_TEMPERATURE

        q, k = (ACTIVATIONS[self.options.activation](t.float()) for t in (q, k))
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        scale = 1.0 if self.options.activation == "softmax" else self.attention.dim**-0.5
        return {"q": q * scale, "k": k, "v": v, "g": g}
