"""Hedgehog: linear attention with learned softmax features and the denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention
from .base import MixerContext
from .decays import source_log_decays
from .linear import LinearAttention, LinearOptions, apply_feature_map
from .weight_spec import WeightSpec


@dataclass(frozen=True)
class HedgehogOptions(LinearOptions):
    """As `LinearOptions`; `rotary` rotates queries and keys before the map, as in LoLCATs."""

    # Outputs of the map, the head's width by default; there are twice as many features.
    feature: int | None = None


class Hedgehog(LinearAttention):
    """Hedgehog (Zhang et al., arXiv 2402.04347).

    phi(x) = [softmax(W x), softmax(-W x)] with W per head, not shared by queries and keys, and
    o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i)^T sum_j phi(k_j)). The maps begin as the
    identity. Published with a first stage that fits the maps alone to the softmax weights.
    """

    name = "hedgehog"
    Options = HedgehogOptions
    denominator = True

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        size = self.key_dim(attention, self.options) // 2
        self.q_map = nn.Parameter(torch.zeros(attention.heads, size, attention.dim))
        self.k_map = nn.Parameter(torch.zeros(self.states, size, attention.dim))

    @classmethod
    def key_dim(cls, attention: Attention, options: HedgehogOptions) -> int:
        """Number of features."""
        return 2 * (options.feature or attention.dim)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections; maps that begin as the identity."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        for name, axes in (("q_map", "kv group"), ("k_map", cls.state_axes(options))):
            table[name] = WeightSpec(
                f"{axes} {cls.key_dim(attention, options) // 2} dim", fresh="identity"
            )
        return table

    @classmethod
    def token_flops(cls, attention: Attention, options: HedgehogOptions) -> int:
        """Feature maps of queries and keys."""
        maps = attention.heads + cls.state_heads(attention, options)
        return maps * attention.dim * cls.key_dim(attention, options)

    def rotated_qkv(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> tuple[
        Float[Tensor, "batch heads time dim"],
        Float[Tensor, "batch states time dim"],
        Float[Tensor, "batch states time value"],
    ]:
        """Queries, keys and values before the maps."""
        q, k, v = self.qkv(x)
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        return q, k, v

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Features of queries and keys, values, the source's ALiBi."""
        q, k, v = self.rotated_qkv(x, mixing)
        return self.featurize(q, k, v)

    def featurize(
        self,
        q: Float[Tensor, "batch heads time dim"],
        k: Float[Tensor, "batch states time dim"],
        v: Float[Tensor, "batch states time value"],
    ) -> dict[str, Tensor]:
        """The same as `inputs`, from queries, keys and values."""
        q, k = (
            softmax_features(apply_feature_map(t, maps))
            for t, maps in ((q, self.q_map), (k, self.k_map))
        )
        return {"q": q, "k": k, "v": v, "g": source_log_decays(self.attention, k)}


def softmax_features(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... 2*dim"]:
    """[softmax(x), softmax(-x)] in float32."""
    x = x.float()
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)
