"""SUPRA: linear attention with a learned ReLU feature map, fixed decay and a norm in place of the denominator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, Mixer, Mixing, Projections, State, Weight, rotate, silence
from .recurrence import chunked, chunked_flops, naive


@dataclass(frozen=True)
class SupraOptions:
    """`feature`: `head` (one square map per head, the paper's text) or `dense` (one over all heads, the released code).

    `start`: initial map, `identity` or `uniform` (PyTorch's default for a linear layer, the released code). `decays`:
    `lightning` (the paper's) or `retnet`. `rotary`: rotate after the feature map, eq. 9. `norm`: GroupNorm per head
    without gain; a published patent application (US20250307633A1) claims this norm, so it can be switched off.
    """

    feature: Literal["head", "dense"] = "head"
    start: Literal["identity", "uniform"] = "identity"
    decays: Literal["lightning", "retnet"] = "lightning"
    rotary: bool = True
    norm: bool = True


def slopes(heads: int) -> list[float]:
    """ALiBi's geometric slopes for any number of heads (arXiv 2108.12409), interleaved beyond a power of two."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return first if power == heads else first + slopes(2 * power)[::2][: heads - power]


def log_decays(kind: str, heads: int) -> Tensor:
    """Fixed log-decay per head, (heads,): -slope (lightning) or log(1 - 2^(-5-h)) (RetNet, arXiv 2307.08621)."""
    if kind == "lightning":
        return -torch.tensor(slopes(heads))
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))))


class Supra(Mixer):
    """SUPRA (Mercat et al., arXiv 2405.06640, eqs. 7-10): phi(x) = relu(W x + b), the same W for queries and keys.

    v'_i = GroupNorm(sum_j gamma^(i-j) RoPE(phi(q_i)) . RoPE(phi(k_j)) v_j). Keys and values are broadcast per head
    before the map, so grouped-query sources keep their heads.
    """

    name = "supra"
    Options = SupraOptions

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.qkv = Projections(attention, expand=True)
        heads, dim = attention.heads, attention.dim
        shape = (heads, dim, dim) if self.options.feature == "head" else (heads * dim, heads * dim)
        self.feature = nn.Parameter(torch.zeros(shape))
        self.feature_bias = nn.Parameter(torch.zeros(heads * dim))

    @property
    def values_are_linear(self) -> bool:  # type: ignore[override]
        """Whether the output is a linear function of the value projection."""
        return not self.options.norm

    @classmethod
    def weights(cls, attention: Attention, spec: dict[str, Any], output: bool = True) -> dict[str, Weight]:
        """The source's projections and a fresh feature map."""
        options = cls.parse(spec)
        head = options.feature == "head"
        bound = (attention.dim if head else attention.heads * attention.dim) ** -0.5
        start = "identity" if options.start == "identity" else f"uniform {bound}"
        table = super().weights(attention, spec, output)
        table["feature"] = Weight("kv group dim dim" if head else "kv group dim -> kv group dim", fresh=start)
        bias = "zeros" if options.start == "identity" else f"uniform {bound}"
        table["feature_bias"] = Weight("-> kv group dim", fresh=bias, decay=False)
        return table

    @classmethod
    def state_numbers(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """One (dim, dim) matrix per query head."""
        return attention.heads * attention.dim**2

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Feature maps, decay, write, read out."""
        return cls.feature_flops(attention, spec) + 5 * attention.heads * attention.dim**2

    @classmethod
    def feature_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Feature maps of a token's queries and keys; a dense one is a map, which is counted once already."""
        dense = cls.parse(spec).feature == "dense"
        return 2 * (attention.heads * attention.dim) ** 2 if dense else 4 * attention.heads * attention.dim**2

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """The chunked recurrence and the feature maps."""
        features = length * cls.feature_flops(attention, spec)
        once, back = chunked_flops(attention.heads, 1, attention.dim, length, delta=False)
        return once + features, back + 2 * features

    def features(self, x: Tensor) -> Tensor:
        """phi; x: (batch, heads, time, dim)."""
        bias = self.feature_bias.view(self.attention.heads, 1, self.attention.dim)
        if self.options.feature == "head":
            return F.relu(x @ self.feature.transpose(-1, -2) + bias)
        flat = F.linear(x.transpose(1, 2).flatten(-2), self.feature)
        return F.relu(flat.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2) + bias)

    def mix(self, x: Tensor, mixing: Mixing, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim) and the state matrix."""
        q, k, v = self.qkv(x)
        q, k = self.features(q), self.features(k * self.attention.dim**-0.5)
        if self.options.rotary:
            q, k = rotate(q, mixing.rotary), rotate(k, mixing.rotary)
        g = log_decays(self.options.decays, self.attention.heads).to(x.device)
        g = g.view(1, -1, 1).expand(*k.shape[:3])
        q, k, v, g = silence(mixing.valid, q.float(), k.float(), v.float(), g)
        run = naive if x.shape[1] == 1 else chunked
        out, last = run(q, k, v, g, None, mixing.segments, state["matrix"] if state else None)
        out = out.transpose(1, 2)
        if self.options.norm:
            out = F.layer_norm(out, out.shape[-1:], eps=1e-5)
        return out.to(x.dtype), {"matrix": last}
