"""SUPRA: linear attention with a learned ReLU feature map, fixed decay and a norm in place of the denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, MixerContext, WeightSpec, apply_rotary
from .decays import HeadDecayAttention
from .linear import apply_feature_map


@dataclass(frozen=True)
class SupraOptions:
    """`feature`: `head` (one square map per head, the paper's text) or `dense` (one over all heads, the released code).

    `start`: initial map, `identity` or `uniform` (PyTorch's default for a linear layer, the released code). `decays`:
    `lightning` (the paper's), `retnet` or `learned` (this project). `rotary`: rotate after the feature map, eq. 9.
    `norm`: GroupNorm per head without gain; a published patent application (US20250307633A1) claims this norm, so it
    can be switched off. `gate`: a new projection that multiplies the heads' outputs; the paper has none.
    """

    feature: Literal["head", "dense"] = "head"
    start: Literal["identity", "uniform"] = "identity"
    decays: Literal["lightning", "retnet", "learned"] = "lightning"
    rotary: bool = True
    norm: bool = True
    gate: Literal["none", "silu", "sigmoid"] = "none"


class Supra(HeadDecayAttention):
    """SUPRA (Mercat et al., arXiv 2405.06640, eqs. 7-10): phi(x) = relu(W x + b), the same W for queries and keys.

    v'_i = GroupNorm(sum_j gamma^(i-j) RoPE(phi(q_i)) . RoPE(phi(k_j)) v_j). Keys and values are broadcast per head
    before the map, so grouped-query sources keep their heads.
    """

    name = "supra"
    Options = SupraOptions

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        heads, dim = attention.heads, attention.dim
        shape = (heads, dim, dim) if self.options.feature == "head" else (heads * dim, heads * dim)
        self.feature = nn.Parameter(torch.zeros(shape))
        self.feature_bias = nn.Parameter(torch.zeros(heads * dim))

    @classmethod
    def is_grouped(cls, options: SupraOptions) -> bool:
        """No: keys and values are broadcast."""
        return False

    @classmethod
    def output_norm_and_gate(cls, options: SupraOptions) -> tuple[str, str]:
        """The group norm, and the gate asked for."""
        return "layer" if options.norm else "none", options.gate

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections and a fresh feature map."""
        options = cls.parse(spec)
        head = options.feature == "head"
        bound = (attention.dim if head else attention.heads * attention.dim) ** -0.5
        start = "identity" if options.start == "identity" else f"uniform {bound}"
        table = super().weights(attention, spec, output)
        table["feature"] = WeightSpec(
            "kv group dim dim" if head else "kv group dim -> kv group dim", fresh=start
        )
        bias = "zeros" if options.start == "identity" else f"uniform {bound}"
        table["feature_bias"] = WeightSpec("-> kv group dim", fresh=bias, decay=False)
        return table

    @classmethod
    def token_flops(cls, attention: Attention, options: SupraOptions) -> int:
        """Feature maps of a token's queries and keys; a dense one is a map, which is counted once already."""
        dense = options.feature == "dense"
        return (
            2 * (attention.heads * attention.dim) ** 2
            if dense
            else 4 * attention.heads * attention.dim**2
        )

    def features(self, x: Tensor) -> Tensor:
        """phi; x: (batch, heads, time, dim)."""
        bias = self.feature_bias.view(self.attention.heads, 1, self.attention.dim)
        if self.options.feature == "head":
            return F.relu(apply_feature_map(x, self.feature) + bias)
        flat = F.linear(x.transpose(1, 2).flatten(-2), self.feature)
        return F.relu(flat.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2) + bias)

    def inputs(self, x: Tensor, mixing: MixerContext) -> dict[str, Tensor]:
        """Features of queries and keys, rotated after the map; values, the heads' decays."""
        q, k, v = self.qkv(x)
        q, k = self.features(q), self.features(k * self.attention.dim**-0.5)
        if self.options.rotary:
            q, k = apply_rotary(q, mixing.rotary), apply_rotary(k, mixing.rotary)
        return {"q": q, "k": k, "v": v, "g": self.decays(k)}
