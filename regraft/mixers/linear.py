"""What mixers with a matrix state share: projections, padding, the recurrence, norm and gate of the heads' outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegraftError
from .base import (
    Attention,
    Mixer,
    MixerContext,
    Projections,
    State,
    WeightSpec,
    mask_padding,
    output_weights,
)
from .dispatch import recur
from .recurrence import CHUNK, chunked_flops

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}
EPS = 1e-5
SIZE_OPTIONS = (
    "feature",
    "rank",
    "shift_rank",
    "window",
)  # options of mixers below, which are 1 or more
MIN_DENOMINATOR = 1e-12  # of a denominator


@dataclass(frozen=True)
class LinearOptions:
    """`rotary`: rotate queries and keys as the source does. `grouped`: query heads of a group share keys, values and
    state, as in the source; else each has its own. `norm`: of each head's output. `gate`: activation of an output gate,
    a new projection of the input that multiplies the heads' outputs.
    """

    rotary: bool = True
    grouped: bool = False
    norm: Literal["none", "rms", "layer"] = "none"
    gate: Literal["none", "silu", "sigmoid"] = "none"


class LinearAttention(Mixer):
    """Linear attention o_t = S_t^T q_t over a matrix state per head; subclasses give `inputs` of the recurrence.

    `inputs` may widen queries and keys to features (`keys`). With `denominator` the output is divided by the same sum
    over values of one, kept as one more column of the state (Katharopoulos et al., arXiv 2006.16236, eq. 9).
    """

    gain: ClassVar[str | None] = None  # axes of the output norm's gain
    bias: ClassVar[bool] = False  # whether that norm has a bias too
    delta: ClassVar[bool] = False
    pairs: ClassVar[int] = CHUNK * CHUNK  # of queries and keys that are scored in a chunk

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.states = self.state_heads(attention, self.options)
        self.qkv = Projections(attention, expand=not self.is_grouped(self.options))
        norm, self.activation = self.output_norm_and_gate(self.options)
        self.kind = norm
        if norm != "none" and self.gain is not None:
            size = attention.dim if self.gain == "dim" else attention.heads * attention.dim
            self.norm = nn.Parameter(torch.ones(size))
            self.norm_bias = nn.Parameter(torch.zeros(size)) if self.bias else None
        if self.activation != "none":
            self.gate = nn.Linear(attention.hidden, attention.heads * attention.dim, bias=False)

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options; RegraftError for sizes that are none."""
        options = super().parse(spec)
        for key, value in vars(options).items():
            if key in SIZE_OPTIONS and isinstance(value, int) and value < 1:
                raise RegraftError(f"mixer '{cls.name}': {key} is {value}, give 1 or more")
        return options

    @classmethod
    def output_norm_and_gate(cls, options: Any) -> tuple[str, str]:
        """(norm, activation of the gate) of the heads' outputs."""
        return options.norm, options.gate

    @classmethod
    def is_grouped(cls, options: Any) -> bool:
        """Whether the query heads of a group share a state."""
        return bool(options.grouped)

    @classmethod
    def state_heads(cls, attention: Attention, options: Any) -> int:
        """Heads that have a state."""
        return attention.kv if cls.is_grouped(options) else attention.heads

    @classmethod
    def state_axes(cls, options: Any) -> str:
        """The same as axes."""
        return "kv" if cls.is_grouped(options) else "kv group"

    @classmethod
    def key_dim(cls, attention: Attention, options: Any) -> int:
        """Width of queries and keys in the recurrence."""
        return attention.dim

    @classmethod
    def value_dim(cls, attention: Attention) -> int:
        """Width of values in the recurrence."""
        return attention.dim + cls.denominator

    @property
    def values_are_linear(self) -> bool:  # type: ignore[override]
        """Whether a map of the head's output can act on its values instead."""
        return self.output_norm_and_gate(self.options) == ("none", "none")

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections; gains one, the gate's projection small."""
        options = cls.parse(spec)
        norm, gate = cls.output_norm_and_gate(options)
        table = {
            f"qkv.{n}": w
            for n, w in Projections.weights(attention, not cls.is_grouped(options)).items()
        }
        table |= output_weights(attention) if output else {}
        if norm != "none" and cls.gain is not None:
            table["norm"] = WeightSpec(f"gain {cls.gain}", fresh="ones", decay=False)
            if cls.bias:
                table["norm_bias"] = WeightSpec(f"-> {cls.gain}", fresh="zeros", decay=False)
        if gate != "none":
            table["gate.weight"] = WeightSpec(
                "hidden -> kv group dim", fresh="normal 0.02", decay=False
            )
        return table

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """One (keys, values) matrix per head that has a state."""
        options = cls.parse(spec)
        return (
            cls.state_heads(attention, options)
            * cls.key_dim(attention, options)
            * cls.value_dim(attention)
        )

    @classmethod
    def token_flops(cls, attention: Attention, options: Any) -> int:
        """Forward FLOPs of a token's matrix products beside maps and recurrence, such as feature maps."""
        return 0

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Decay, (read for the delta rule,) write per state, read out per query head; what `token_flops` says."""
        options = cls.parse(spec)
        matrix = cls.key_dim(attention, options) * cls.value_dim(attention)
        heads = (5 if cls.delta else 3) * cls.state_heads(attention, options) + 2 * attention.heads
        return heads * matrix + cls.token_flops(attention, options)

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """The chunked recurrence, and what `token_flops` says."""
        options = cls.parse(spec)
        states = cls.state_heads(attention, options)
        widths = cls.key_dim(attention, options), cls.value_dim(attention)
        once, back = chunked_flops(
            states, attention.heads // states, *widths, length, cls.delta, cls.pairs
        )
        tokens = length * cls.token_flops(attention, options)
        return once + tokens, back + 2 * tokens

    def inputs(self, x: Tensor, mixing: MixerContext) -> dict[str, Tensor]:
        """Arguments of `dispatch.recur` but segments and state, from x: (batch, time, hidden)."""
        raise NotImplementedError

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim) and the state matrix."""
        out, last = self.run_recurrence(
            self.inputs(x, mixing), mixing, state["matrix"] if state else None
        )
        return self.normalize_and_gate(out, x).to(x.dtype), {"matrix": last}

    def matrix(self, x: Tensor, mixing: MixerContext) -> Tensor:
        """As in the base class: what comes of values that are one at a single token."""
        if type(self).mix is not LinearAttention.mix:
            return super().matrix(x, mixing)
        inputs = self.inputs(x, mixing)
        heads, time = inputs["v"].shape[1:3]
        inputs["v"] = torch.eye(time, device=x.device).expand(x.shape[0], heads, time, time)
        out, _ = self.run_recurrence(inputs, mixing, None)
        return (
            out[..., :-1] / out[..., -1:].clamp(min=MIN_DENOMINATOR) if self.denominator else out
        ).transpose(1, 2)

    def run_recurrence(
        self, inputs: dict[str, Tensor], mixing: MixerContext, matrix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (batch, time, heads, values) and the last state; padding neither writes nor decays."""
        dtype = inputs["v"].dtype
        inputs = {name: value.float() for name, value in inputs.items()}
        if self.denominator:
            inputs["v"] = F.pad(inputs["v"], (0, 1), value=1.0)
        for name in ("k", "v", "g", "beta"):
            if name in inputs:
                (inputs[name],) = mask_padding(mixing.valid, inputs[name])
        out, last = recur(**inputs, segments=mixing.segments, state=matrix, dtype=dtype)
        return out.transpose(1, 2), last

    def normalize_and_gate(self, out: Tensor, x: Tensor) -> Tensor:
        """Denominator, norm and gate; out: (batch, time, heads, values), x: what the gate reads."""
        if self.denominator:
            out = out[..., :-1] / out[..., -1:].clamp(min=MIN_DENOMINATOR)
        if self.kind == "rms":
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS)
        elif self.kind == "layer":
            out = F.layer_norm(out, out.shape[-1:], eps=EPS)
        if self.kind != "none" and self.gain is not None:
            out = out * self.norm.float().view(-1, self.attention.dim)
            if self.norm_bias is not None:
                out = out + self.norm_bias.float().view(-1, self.attention.dim)
        if self.activation != "none":
            out = out * ACTIVATIONS[self.activation](self.gate(x).float()).view_as(out)
        return out


def apply_feature_map(x: Tensor, maps: Tensor) -> Tensor:
    """x: (batch, heads, time, dim) -> (..., features) by maps (heads or groups of heads, features, dim)."""
    return (x.to(maps.dtype).unflatten(1, (len(maps), -1)) @ maps.unsqueeze(1).mT).flatten(1, 2)


def low_rank_weights(name: str, rank: int, axes: str, start: str) -> dict[str, WeightSpec]:
    """A new low-rank map from the input that begins as its bias, `start`."""
    return {
        f"{name}_in.weight": WeightSpec(f"hidden -> {rank}", fresh="normal 0.02", decay=False),
        f"{name}_out.weight": WeightSpec(f"{rank} -> {axes}", fresh="zeros", decay=False),
        f"{name}_out.bias": WeightSpec(f"-> {axes}", fresh=start, decay=False),
    }


def mean_decay(distance: Tensor, states: int) -> Tensor:
    """Rate whose half-life is the mean distance (heads,) of each state's heads, within [1e-3, 5]: (states,)."""
    return (math.log(2) / distance.view(states, -1).mean(1)).clamp(1e-3, 5.0)
