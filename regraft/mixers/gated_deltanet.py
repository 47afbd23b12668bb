"""Gated DeltaNet in the source's own terms: its projections, norms and rotary embedding, plus two gates per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, Mixer, Mixing, Projections, State, Weight, output_weights, rotate, silence
from .recurrence import chunked, chunked_flops, naive

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu}


@dataclass(frozen=True)
class DeltaOptions:
    """`rotary`: rotate queries and keys as the source does. `activation`: none or silu on q, k and v.

    `grouped`: query heads of a group share keys, values, gates and state, as in the source; else each has its own.
    `norm`: RMS-normalise each head's output. `gate`: multiply it by silu of a projection of the input.
    """

    rotary: bool = True
    activation: Literal["none", "silu"] = "none"
    grouped: bool = True
    norm: bool = False
    gate: bool = False


class GatedDeltaNet(Mixer):
    """Gated delta rule (Yang et al., arXiv 2412.06464) on unit-length queries and keys.

    g_t = -exp(rate) softplus(W_g x_t + b_g) is the log-decay, beta_t = sigmoid(W_b x_t + b_b) the write strength, both
    per query head. No convolution, activation or output norm unless asked for: what the teacher lacks does not pay in a
    short distillation (arXiv 2505.03005, ablations).
    """

    name = "gated_deltanet"
    Options = DeltaOptions

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.qkv = Projections(attention, expand=not self.options.grouped)
        self.states = attention.kv if self.options.grouped else attention.heads
        self.decay = nn.Linear(attention.hidden, self.states)
        self.beta = nn.Linear(attention.hidden, self.states)
        self.rate = nn.Parameter(torch.zeros(self.states))
        width = attention.heads * attention.dim
        self.norm = nn.Parameter(torch.ones(attention.dim)) if self.options.norm else None
        self.gate = nn.Linear(attention.hidden, width, bias=False) if self.options.gate else None

    @property
    def values_are_linear(self) -> bool:  # type: ignore[override]
        """Whether the output is a linear function of the value projection."""
        return self.options.activation == "none" and not self.options.norm

    @classmethod
    def weights(cls, attention: Attention, spec: dict[str, Any], output: bool = True) -> dict[str, Weight]:
        """Gates start constant: half-life about 44 tokens, write strength one half."""
        options = cls.parse(spec)
        axes = "kv" if options.grouped else "kv group"
        table = {f"qkv.{n}": w for n, w in Projections.weights(attention, not options.grouped).items()}
        table |= output_weights(attention) if output else {}
        for name, start in (("decay", "constant -4.0"), ("beta", "zeros")):
            table[f"{name}.weight"] = Weight(f"hidden -> {axes}", fresh="zeros", decay=False)
            table[f"{name}.bias"] = Weight(f"-> {axes}", fresh=start, decay=False)
        table["rate"] = Weight(f"-> {axes}", fresh="zeros", decay=False)
        if options.norm:
            table["norm"] = Weight("gain dim", fresh="ones", decay=False)
        if options.gate:
            table["gate.weight"] = Weight("hidden -> kv group dim", fresh="normal 0.02", decay=False)
        return table

    @classmethod
    def state_numbers(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """One (dim, dim) matrix per query head, or per group."""
        return (attention.kv if cls.parse(spec).grouped else attention.heads) * attention.dim**2

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Decay, read for the delta rule and write per state, read out per query head."""
        return 5 * cls.state_numbers(attention, spec) + 2 * attention.heads * attention.dim**2

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """The chunked delta rule."""
        states = attention.kv if cls.parse(spec).grouped else attention.heads
        return chunked_flops(states, attention.heads // states, attention.dim, length, delta=True)

    @torch.no_grad()
    def start_gates(self, distance: Tensor, entropy: Tensor) -> None:
        """Half-life = mean distance, write strength from entropy (Taylor-Calibrate, arXiv 2606.16429).

        The log-decay is ln 2 / distance within [1e-3, 5]; beta = 0.3 + 0.4 (1 - entropy).
        """
        distance, entropy = (t.view(self.states, -1).mean(1) for t in (distance, entropy))
        g = (math.log(2) / distance).clamp(1e-3, 5.0)
        self.decay.bias.copy_(g.expm1().log())
        self.rate.zero_()
        self.beta.bias.copy_(torch.logit(0.3 + 0.4 * (1 - entropy)))

    def inputs(self, x: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Unit q and k, v, log-decay and write strength in float32; padding neither writes nor decays."""
        act = ACTIVATIONS[self.options.activation]
        q, k, v = (act(t) for t in self.qkv(x))
        if self.options.rotary:
            q, k = rotate(q, mixing.rotary), rotate(k, mixing.rotary)
        q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        g = -(self.rate.float().exp() * F.softplus(self.decay(x).float())).transpose(1, 2)
        beta = self.beta(x).float().sigmoid().transpose(1, 2)
        k, v, g, beta = silence(mixing.valid, k, v.float(), g, beta)
        return q, k, v, g, beta

    def mix(self, x: Tensor, mixing: Mixing, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim) and the state matrix."""
        q, k, v, g, beta = self.inputs(x, mixing)
        run = naive if x.shape[1] == 1 else chunked
        out, last = run(q, k, v, g, beta, mixing.segments, state["matrix"] if state else None)
        out = out.transpose(1, 2)
        if self.norm is not None:
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * self.norm.float()
        if self.gate is not None:
            out = out * F.silu(self.gate(x)).float().view_as(out)
        return out.to(x.dtype), {"matrix": last}
