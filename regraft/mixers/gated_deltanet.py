"""Gated DeltaNet on the source's projections, norms and rotary embedding, two gates per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from .base import Attention, MixerContext, WeightSpec, apply_rotary
from .linear import ACTIVATIONS, LinearAttention, mean_decay


@dataclass(frozen=True)
class DeltaOptions:
    """Options of Gated DeltaNet."""

    # Rotate queries and keys as the source does.
    rotary: bool = True
    # Of queries, keys and values.
    activation: Literal["none", "silu"] = "none"
    # The query heads of a group share keys, values, gates and state, as in the source; else each
    # head has its own.
    grouped: bool = True
    # RMS norm of each head's output.
    norm: bool = False
    # Multiply the outputs by silu of a new projection of the input.
    gate: bool = False


class GatedDeltaNet(LinearAttention):
    """Gated delta rule (Yang et al., arXiv 2412.06464) on unit-length queries and keys.

    g_t = -exp(rate) softplus(W_g x_t + b_g) is the log-decay, beta_t = sigmoid(W_b x_t + b_b) the
    write strength, both per query head. There is no convolution, and by default no activation or
    output norm: what the teacher lacks does not help in a short distillation (arXiv 2505.03005,
    ablations).
    """

    name = "gated_deltanet"
    Options = DeltaOptions
    delta = True
    gain = "dim"

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.decay = nn.Linear(attention.hidden, self.states)
        self.beta = nn.Linear(attention.hidden, self.states)
        self.rate = nn.Parameter(torch.zeros(self.states))

    @classmethod
    def output_norm_and_gate(cls, options: DeltaOptions) -> tuple[str, str]:
        """RMS norm with gain and SiLU gate, as the options say."""
        return "rms" if options.norm else "none", "silu" if options.gate else "none"

    @property
    def values_are_linear(self) -> bool:  # type: ignore[override]
        """Whether a map of the head's output can act on its values instead."""
        return self.options.activation == "none" and super().values_are_linear

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Gates start constant: half-life about 44 tokens, write strength one half."""
        axes = cls.state_axes(cls.parse(spec))
        table = super().weights(attention, spec, output)
        for name, start in (("decay", "constant -4.0"), ("beta", "zeros")):
            table[f"{name}.weight"] = WeightSpec(f"hidden -> {axes}", fresh="zeros", decay=False)
            table[f"{name}.bias"] = WeightSpec(f"-> {axes}", fresh=start, decay=False)
        table["rate"] = WeightSpec(f"-> {axes}", fresh="zeros", decay=False)
        return table

    @torch.no_grad()
    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Half-life = mean distance, write strength from entropy.

        Taylor-Calibrate (arXiv 2606.16429): the log-decay is ln 2 / distance within [1e-3, 5], and
        beta = 0.3 + 0.4 (1 - entropy).
        """
        # log(expm1(y)) is the inverse of softplus; rate zero leaves the softplus as the log-decay.
        self.decay.bias.copy_(mean_decay(distance, self.states).expm1().log())
        self.rate.zero_()
        self.beta.bias.copy_(torch.logit(0.3 + 0.4 * (1 - entropy.view(self.states, -1).mean(1))))

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Unit queries and keys, values, log-decay and write strength."""
        act = ACTIVATIONS[self.options.activation]
        q, k, v = (act(t) for t in self.qkv(x))
        if self.options.rotary:
            q, k = apply_rotary(q, mixing.rotary), apply_rotary(k, mixing.rotary)
        q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        g = -(self.rate.float().exp() * F.softplus(self.decay(x).float())).transpose(1, 2)
        beta = self.beta(x).float().sigmoid().transpose(1, 2)
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta}
