"""T2R: linear attention with learned ReLU features, which merge into the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention
from .base import MixerContext
from .decays import source_log_decays
from .latent import refuse_latent
from .linear import LinearAttention, LinearOptions, apply_feature_map
from .weight_spec import WeightSpec


@dataclass(frozen=True)
class T2rOptions(LinearOptions):
    """As `LinearOptions`, and the feature map."""

    # Rotate queries and keys before the map, which then cannot be merged.
    rotary: bool = False
    # Features of the map, the head's width by default; fewer make a smaller state.
    feature: int | None = None
    # Initial map: identity, or uniform, PyTorch's default for a linear layer.
    start: Literal["identity", "uniform"] = "identity"
    # The projections give features directly; see `linearize.merge`.
    merged: bool = False


class T2r(LinearAttention):
    """T2R (Kasai et al., arXiv 2103.13076).

    phi(x) = relu(W x + b) per head, the same for its queries and keys, and o_i = phi(q_i)^T sum_j
    phi(k_j) v_j^T / (phi(q_i)^T sum_j phi(k_j)); zero where no feature of the query meets one of a
    key. No decay but the source's ALiBi, no positions but the model's own. Published for
    fine-tuning all weights on the task.
    """

    name = "t2r"
    Options = T2rOptions
    denominator = True

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        size = self.key_dim(attention, self.options)
        if self.options.merged:
            self.q_proj = nn.Linear(attention.hidden, attention.heads * size)
            self.k_proj = nn.Linear(attention.hidden, self.states * size)
            self.q_norm = self.k_norm = None
        else:
            self.map = nn.Parameter(torch.zeros(self.states, size, attention.dim))
            self.map_bias = nn.Parameter(torch.zeros(self.states * size))

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> T2rOptions:
        """Options; RegraftError for a merged map behind rotated queries."""
        options: T2rOptions = super().parse(spec)
        if options.merged and options.rotary:
            raise RegraftError(
                f"mixer 't2r': a merged map comes before rotary ({options.rotary}): set rotary to "
                "false"
            )
        return options

    @classmethod
    def key_dim(cls, attention: Attention, options: T2rOptions) -> int:
        """Number of features."""
        return options.feature or attention.dim

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections and a new feature map, or new projections to features."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        size, axes = cls.key_dim(attention, options), cls.state_axes(options)

        # Merged projections have no source: `linearize.merge` gives their values.
        if options.merged:
            why = "its maps stay behind the projections: leave it unmerged"
            refuse_latent(attention, "'t2r' with merged maps", why)
            for name in [name for name in table if name.startswith(("q_", "k_"))]:
                del table[name]
            for name, heads in (("q", "kv group"), ("k", axes)):
                weight = WeightSpec(f"hidden -> {heads} {size}", fresh="normal 0.02")
                bias = WeightSpec(f"-> {heads} {size}", fresh="zeros", decay=False)
                table |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
            return table

        start, start_bias = "identity", "zeros"
        if options.start != "identity":
            start = start_bias = f"uniform {attention.dim**-0.5}"
        table["map"] = WeightSpec(f"{axes} {size} dim", fresh=start)
        table["map_bias"] = WeightSpec(f"-> {axes} {size}", fresh=start_bias, decay=False)
        return table

    @classmethod
    def token_flops(cls, attention: Attention, options: T2rOptions) -> int:
        """Feature maps of queries and keys, unless merged."""
        maps = attention.heads + cls.state_heads(attention, options)
        return 0 if options.merged else 2 * maps * attention.dim * cls.key_dim(attention, options)

    def features(
        self, x: Float[Tensor, "batch heads time dim"]
    ) -> Float[Tensor, "batch heads time features"]:
        """phi of queries or keys; a group of heads in a row shares a map."""
        group = x.shape[1] // self.states
        bias = self.map_bias.view(self.states, 1, -1).repeat_interleave(group, 0)
        return F.relu(apply_feature_map(x, self.map) + bias)

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Features of queries and keys, values, the source's ALiBi."""
        q, k, v = self.qkv(x)
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)

        # Merged projections include the map, all but the ReLU.
        phi = F.relu if self.options.merged else self.features
        q, k = phi(q), phi(k)
        return {"q": q, "k": k, "v": v, "g": source_log_decays(self.attention, k)}
