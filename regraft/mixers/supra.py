"""SUPRA: linear attention with learned ReLU features, fixed decays and a norm, no denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention
from .base import MixerContext
from .decays import HeadDecayAttention
from .linear import apply_feature_map
from .weight_spec import WeightSpec


@dataclass(frozen=True)
class SupraOptions:
    """Options of SUPRA."""

    # `head`: one square map per head (the paper's text); `dense`: one over all heads (the released
    # code).
    feature: Literal["head", "dense"] = "head"
    # Initial map: `identity`, or `uniform` as PyTorch starts a linear layer (the released code).
    start: Literal["identity", "uniform"] = "identity"
    # `lightning` is the paper's; `learned` is this project's.
    decays: Literal["lightning", "retnet", "learned"] = "lightning"
    # Rotate after the feature map (eq. 9).
    rotary: bool = True
    # GroupNorm per head without gain. A published patent application (US20250307633A1) claims this
    # norm, so it can be switched off.
    norm: bool = True
    # Activation of an output gate; the paper has none.
    gate: Literal["none", "silu", "sigmoid"] = "none"


class Supra(HeadDecayAttention):
    """SUPRA (Mercat et al., arXiv 2405.06640, eqs. 7-10).

    phi(x) = relu(W x + b), the same W for queries and keys, and v'_i = GroupNorm(sum_j gamma^(i-j)
    RoPE(phi(q_i)) . RoPE(phi(k_j)) v_j). Keys and values are broadcast per head before the map, so
    grouped-query sources keep their heads.
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
        """The group norm and the gate, as the options say."""
        return "layer" if options.norm else "none", options.gate

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections and a fresh feature map."""
        options = cls.parse(spec)
        head = options.feature == "head"

        # PyTorch's default for a linear layer is uniform within one over the root of its inputs.
        bound = (attention.dim if head else attention.heads * attention.dim) ** -0.5
        start = "identity" if options.start == "identity" else f"uniform {bound}"
        bias = "zeros" if options.start == "identity" else f"uniform {bound}"

        table = super().weights(attention, spec, output)
        axes = "kv group dim dim" if head else "kv group dim -> kv group dim"
        table["feature"] = WeightSpec(axes, fresh=start)
        table["feature_bias"] = WeightSpec("-> kv group dim", fresh=bias, decay=False)
        return table

    @classmethod
    def token_flops(cls, attention: Attention, options: SupraOptions) -> int:
        """Feature maps of a token's queries and keys.

        A dense map is a weight from one side to the other, which is counted once elsewhere.
        """
        if options.feature == "dense":
            return 2 * (attention.heads * attention.dim) ** 2
        return 4 * attention.heads * attention.dim**2

    def features(
        self, x: Float[Tensor, "batch heads time dim"]
    ) -> Float[Tensor, "batch heads time dim"]:
        """phi of queries or keys."""
        bias = self.feature_bias.view(self.attention.heads, 1, self.attention.dim)
        if self.options.feature == "head":
            return F.relu(apply_feature_map(x, self.feature) + bias)
        flat = F.linear(x.transpose(1, 2).flatten(-2), self.feature)
        return F.relu(flat.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2) + bias)

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Features of queries and keys, rotated after the map; values, the heads' decays."""
        q, k, v = self.qkv(x)
        q, k = self.features(q), self.features(k * self.attention.dim**-0.5)
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        return {"q": q, "k": k, "v": v, "g": self.decays(k)}
