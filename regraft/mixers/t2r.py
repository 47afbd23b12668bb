"""T2R: linear attention with a learned ReLU feature map and the denominator, mergeable into the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegraftError
from .base import Attention, MixerContext, WeightSpec, apply_rotary
from .decays import fixed_log_decays
from .linear import LinearAttention, LinearOptions, apply_feature_map


@dataclass(frozen=True)
class T2rOptions(LinearOptions):
    """As `LinearOptions`; `rotary` turns queries and keys before the map, and then it cannot be merged.

    `feature`: size of the map, the head's by default; smaller ones make a smaller state. `start`: initial map, identity
    or uniform (PyTorch's default for a linear layer). `merged`: projections give features directly, see `steps.merge`.
    """

    rotary: bool = False
    feature: int | None = None
    start: Literal["identity", "uniform"] = "identity"
    merged: bool = False


class T2r(LinearAttention):
    """T2R (Kasai et al., arXiv 2103.13076): phi(x) = relu(W x + b) per head, the same for its queries and keys.

    o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i)^T sum_j phi(k_j)); zero where no feature of the query meets one of
    a key. No decay, no positions but the model's own. Published for fine-tuning all weights on the task.
    """

    name = "t2r"
    Options = T2rOptions
    denominator = True

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        size = self.key_dim(attention, self.options)
        if self.options.merged:
            self.qkv = FeatureProjections(attention, size, self.states)  # type: ignore[assignment]
        else:
            self.map = nn.Parameter(torch.zeros(self.states, size, attention.dim))
            self.map_bias = nn.Parameter(torch.zeros(self.states * size))

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> T2rOptions:
        """Options; RegraftError for a merged map behind rotated queries."""
        options: T2rOptions = super().parse(spec)
        if options.merged and options.rotary:
            raise RegraftError(
                f"mixer 't2r': a merged map comes before rotary ({options.rotary}): set rotary to false"
            )
        return options

    @classmethod
    def key_dim(cls, attention: Attention, options: T2rOptions) -> int:
        """Features."""
        return options.feature or attention.dim

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections and a fresh feature map; merged: fresh projections to features."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        size, axes = cls.key_dim(attention, options), cls.state_axes(options)
        if options.merged:
            table = {
                name: weight
                for name, weight in table.items()
                if not name.startswith(("qkv.q", "qkv.k"))
            }
            for name, wide in (("q", "kv group"), ("k", axes)):
                table[f"qkv.{name}.weight"] = WeightSpec(
                    f"hidden -> {wide} {size}", fresh="normal 0.02"
                )
                table[f"qkv.{name}.bias"] = WeightSpec(
                    f"-> {wide} {size}", fresh="zeros", decay=False
                )
            return table
        bound = f"uniform {attention.dim**-0.5}"
        identity = options.start == "identity"
        table["map"] = WeightSpec(f"{axes} {size} dim", fresh="identity" if identity else bound)
        table["map_bias"] = WeightSpec(
            f"-> {axes} {size}", fresh="zeros" if identity else bound, decay=False
        )
        return table

    @classmethod
    def token_flops(cls, attention: Attention, options: T2rOptions) -> int:
        """Feature maps of queries and keys, unless merged."""
        maps = attention.heads + cls.state_heads(attention, options)
        return 0 if options.merged else 2 * maps * attention.dim * cls.key_dim(attention, options)

    def features(self, x: Tensor) -> Tensor:
        """phi; x: (batch, heads, time, dim)."""
        bias = self.map_bias.view(self.states, 1, -1).repeat_interleave(
            x.shape[1] // self.states, 0
        )
        return F.relu(apply_feature_map(x, self.map) + bias)

    def inputs(self, x: Tensor, mixing: MixerContext) -> dict[str, Tensor]:
        """Features of queries and keys, values, no decay."""
        q, k, v = self.qkv(x)
        if self.options.rotary:
            q, k = apply_rotary(q, mixing.rotary), apply_rotary(k, mixing.rotary)
        q, k = (
            (F.relu(q), F.relu(k)) if self.options.merged else (self.features(q), self.features(k))
        )
        return {"q": q, "k": k, "v": v, "g": fixed_log_decays("none", k)}


class FeatureProjections(nn.Module):
    """Projections from the input to features before the ReLU, and to values."""

    def __init__(self, attention: Attention, size: int, states: int):
        super().__init__()
        self.heads = (attention.heads, states, states)
        self.q = nn.Linear(attention.hidden, attention.heads * size)
        self.k = nn.Linear(attention.hidden, states * size)
        self.v = nn.Linear(attention.hidden, states * attention.dim, bias=attention.qkv_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (batch, time, hidden) -> features of queries and keys, values, (batch, heads, time, ...)."""
        maps = zip((self.q, self.k, self.v), self.heads, strict=True)
        return tuple(layer(x).unflatten(-1, (count, -1)).transpose(1, 2) for layer, count in maps)
