"""What mixers with a matrix state share: projections, recurrence, norm and gate of the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention
from .base import Mixer, MixerContext, State, output_weights, projection_weights
from .dispatch import recur
from .recurrence import CHUNK, chunked_flops
from .tensors import keep_finite, mask_padding
from .weight_spec import WeightSpec

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}
EPS = 1e-5
# Options of the mixers that build on this module which must be 1 or more.
SIZE_OPTIONS = ("feature", "rank", "shift_rank", "window")
MIN_DENOMINATOR = 1e-12


@dataclass(frozen=True)
class LinearOptions:
    """Options that most mixers with a matrix state have."""

    # Rotate queries and keys as the source does.
    rotary: bool = True
    # The query heads of a group share keys, values and state, as in the source; else each head has
    # its own.
    grouped: bool = False
    # Norm of each head's output.
    norm: Literal["none", "rms", "layer"] = "none"
    # Activation of an output gate, a new projection of the input that multiplies the outputs.
    gate: Literal["none", "silu", "sigmoid"] = "none"


class LinearAttention(Mixer):
    """Linear attention o_t = S_t^T q_t over a matrix state per head.

    Subclasses give the `inputs` of the recurrence, which may widen queries and keys to features
    (`key_dim`). With `denominator` the output is divided by the same sum over values of one, kept
    as one more column of the state (Katharopoulos et al., arXiv 2006.16236, eq. 9).
    """

    # Axes of the output norm's gain; None: it has none.
    gain: ClassVar[str | None] = None
    # Whether that norm has a bias too.
    bias: ClassVar[bool] = False
    # Whether the recurrence is the delta rule.
    delta: ClassVar[bool] = False
    # Pairs of queries and keys that are scored in a chunk.
    pairs: ClassVar[int] = CHUNK * CHUNK
    gate: nn.Linear

    @property
    def normed_gate(self) -> bool:
        """Whether calibration sets an output gate, because a norm before it takes the outputs'
        size.
        """
        return False

    @property
    def eps(self) -> float:
        """Epsilon of the output norm."""
        return EPS

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.add_projections(expand=not self.is_grouped(self.options))
        norm, self.activation = self.output_norm_and_gate(self.options)
        self.kind = norm

        # A layer has only the parameters that its options use: `weights` says the same.
        if norm != "none" and self.gain is not None:
            width = attention.value_dim
            size = width if self.gain == "dim" else attention.heads * width
            self.norm = nn.Parameter(torch.ones(size))
            self.norm_bias = nn.Parameter(torch.zeros(size)) if self.bias else None
        if self.activation != "none":
            width = attention.heads * attention.value_dim
            self.gate = nn.Linear(attention.hidden, width, bias=False)

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options; RegraftError for an unknown option, a wrong type or a size below 1."""
        options = super().parse(spec)
        for key, value in vars(options).items():
            if key in SIZE_OPTIONS and isinstance(value, int) and value < 1:
                raise RegraftError(f"mixer '{cls.name}': {key} is {value}, give 1 or more")
        return options

    @classmethod
    def output_norm_and_gate(cls, options: Any) -> tuple[str, str]:
        """(norm, activation of the gate) of the heads' outputs, "none" for neither."""
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
        """The same as named axes of a signature."""
        return "kv" if cls.is_grouped(options) else "kv group"

    @classmethod
    def key_dim(cls, attention: Attention, options: Any) -> int:
        """Width of queries and keys in the recurrence."""
        return attention.dim

    @classmethod
    def value_dim(cls, attention: Attention) -> int:
        """Width of values in the recurrence."""
        return attention.value_dim + cls.denominator

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
        table = projection_weights(attention, expand=not cls.is_grouped(options))
        table |= output_weights(attention) if output else {}

        if norm != "none" and cls.gain is not None:
            axes = cls.gain.replace("dim", attention.value_axis)
            table["norm"] = WeightSpec(f"gain {axes}", fresh="ones", decay=False)
            if cls.bias:
                table["norm_bias"] = WeightSpec(f"-> {axes}", fresh="zeros", decay=False)
        # Small, not zero: silu of zero is zero and would pass no gradient to the heads.
        if gate != "none":
            axes = f"hidden -> kv group {attention.value_axis}"
            table["gate.weight"] = WeightSpec(axes, fresh="normal 0.02", decay=False)
        return table

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """One (keys, values) matrix per head that has a state."""
        options = cls.parse(spec)
        matrix = cls.key_dim(attention, options) * cls.value_dim(attention)
        return cls.state_heads(attention, options) * matrix

    @classmethod
    def token_flops(cls, attention: Attention, options: Any) -> int:
        """Forward FLOPs per token beside projections and recurrence, such as feature maps."""
        return 0

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Decay and write per state, read out per query head, and what `token_flops` says.

        The delta rule also reads each state before it writes.
        """
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
        group = attention.heads // states
        forward, backward = chunked_flops(states, group, *widths, length, cls.delta, cls.pairs)
        tokens = length * cls.token_flops(attention, options)
        return forward + tokens, backward + 2 * tokens

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Arguments of `dispatch.recur` by name, all but segments and state."""
        raise NotImplementedError

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the state, one matrix per head; see `Mixer.mix`."""
        past = state or {}
        inputs, new = self.read_inputs(x, mixing, past)
        out, new["matrix"] = self.run_recurrence(inputs, mixing, past.get("matrix"))
        return keep_finite(self.normalize_and_gate(out, x), x.dtype), new

    def read_inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, past: State
    ) -> tuple[dict[str, Tensor], State]:
        """(`inputs`, states beside the matrix); a mixer with none has only `inputs`.

        Args:
            x, mixing: as of `mix`.
            past: the states after the tokens before; empty at the start of a sequence.
        """
        return self.inputs(x, mixing), {}

    def matrix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> Float[Tensor, "batch heads time time"]:
        """How values are mixed over tokens, before norms and gates; see `Mixer.matrix`."""
        # A subclass with a mix of its own has inputs that this method does not know.
        if type(self).mix is not LinearAttention.mix:
            return super().matrix(x, mixing)

        # Value number i is one at token i and zero elsewhere, so output number i is column i.
        inputs = self.inputs(x, mixing)
        heads, time = inputs["v"].shape[1:3]
        inputs["v"] = torch.eye(time, device=x.device).expand(x.shape[0], heads, time, time)
        out, _ = self.run_recurrence(inputs, mixing, None)
        if self.denominator:
            out = out[..., :-1] / out[..., -1:].clamp(min=MIN_DENOMINATOR)
        return out.transpose(1, 2)

    def run_recurrence(
        self,
        inputs: dict[str, Tensor],
        mixing: MixerContext,
        matrix: Float[Tensor, "batch states keys values"] | None,
    ) -> tuple[Float[Tensor, "batch time heads values"], Float[Tensor, "batch states keys values"]]:
        """(outputs, last state); padding neither writes nor decays.

        Args:
            inputs: as `inputs` gives them.
            mixing: padding and documents of these tokens.
            matrix: the state before the first token; None: zeros.
        """
        dtype = inputs["v"].dtype
        inputs = {name: value.float() for name, value in inputs.items()}
        if self.denominator:
            inputs["v"] = F.pad(inputs["v"], (0, 1), value=1.0)

        # A log-decay of zero keeps the state, a key or value of zero adds nothing to it.
        for name in ("k", "v", "g", "beta"):
            if name in inputs:
                (inputs[name],) = mask_padding(mixing.valid, inputs[name])
        out, last = recur(
            **inputs,
            segments=mixing.segments,
            state=matrix,
            dtype=dtype,
            overwrite=mixing.overwrite,
        )
        return out.transpose(1, 2), last

    def normalize_and_gate(
        self,
        out: Float[Tensor, "batch time heads values"],
        x: Float[Tensor, "batch time hidden"],
    ) -> Float[Tensor, "batch time heads dim"]:
        """Denominator, norm and gate of the recurrence's outputs; the gate reads `x`."""
        if self.denominator:
            out = out[..., :-1] / out[..., -1:].clamp(min=MIN_DENOMINATOR)

        # Per head, in float32, which the recurrence's outputs are.
        if self.kind == "rms":
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps)
        elif self.kind == "layer":
            out = F.layer_norm(out, out.shape[-1:], eps=self.eps)
        if self.kind != "none" and self.gain is not None:
            width = self.attention.value_dim
            out = out * self.norm.float().view(-1, width)
            if self.norm_bias is not None:
                out = out + self.norm_bias.float().view(-1, width)

        if self.activation != "none":
            out = out * ACTIVATIONS[self.activation](self.gate(x).float()).view_as(out)
        return out


def apply_feature_map(
    x: Float[Tensor, "batch heads time dim"], maps: Float[Tensor, "maps features dim"]
) -> Float[Tensor, "batch heads time features"]:
    """A linear map of each head; `maps` has one per head, or one per group of heads in a row."""
    return (x.to(maps.dtype).unflatten(1, (len(maps), -1)) @ maps.unsqueeze(1).mT).flatten(1, 2)


def low_rank_weights(name: str, rank: int, axes: str, start: str) -> dict[str, WeightSpec]:
    """A new low-rank map from the input that begins as its bias alone.

    Args:
        name: of the parameters, `{name}_in` and `{name}_out`.
        rank: of the map.
        axes: named axes of the map's output.
        start: initial value of the bias.
    """
    return {
        f"{name}_in.weight": WeightSpec(f"hidden -> {rank}", fresh="normal 0.02", decay=False),
        f"{name}_out.weight": WeightSpec(f"{rank} -> {axes}", fresh="zeros", decay=False),
        f"{name}_out.bias": WeightSpec(f"-> {axes}", fresh=start, decay=False),
    }


def mean_decay(distance: Float[Tensor, " heads"], states: int) -> Float[Tensor, " {states}"]:
    """Decay rate of each state whose half-life is the mean distance of its heads, in [1e-3, 5]."""
    return (math.log(2) / distance.view(states, -1).mean(1)).clamp(1e-3, 5.0)
