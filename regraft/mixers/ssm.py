"""What state-space mixers share: two layouts, the short convolution, a linear recurrence with a decay per number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegraftError
from .base import Attention, Mixer, MixerContext, Projections, WeightSpec, output_weights

DT_INIT = "timesteps 0.001 0.1"
OWN_LAYOUT_OPTIONS = (
    "expand",
    "state",
    "head_dim",
)  # options that the attention's shape decides in the other layout


@dataclass(frozen=True)
class SsmOptions:
    """`layout`: `own`, the paper's block, all of it new, `expand` times as wide as the stream with `state` numbers per
    channel; or `attention` (MambaInLlama, arXiv 2408.15237): the values are the input x, keys are B, queries are C, the
    output projection is the source's, so that heads and their width are the attention's. `conv`: taps of the
    convolution.
    """

    layout: Literal["own", "attention"] = "own"
    expand: int = 2
    state: int = 16
    conv: int = 4


@dataclass(frozen=True)
class Widths:
    """`heads` of `dim` channels with `state` numbers each; the axes of all channels, of a head, and of B and C."""

    heads: int
    dim: int
    state: int
    channels: str
    head: str
    keys: str

    @property
    def inner(self) -> int:
        """All channels."""
        return self.heads * self.dim


class StateSpace(Mixer):
    """A gated state-space block; subclasses add what makes B, C and the time step of a token, and the recurrence.

    Nothing turns: in the attention layout the source's rotary embedding is left out, as MambaInLlama does.
    """

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output=False)
        self.own = self.options.layout == "own"
        self.widths = self.widths_of(attention, self.options)
        inner = self.widths.inner
        if self.own:
            self.x = nn.Linear(attention.hidden, inner, bias=False)
        else:
            self.qkv = Projections(attention, expand=True)
        self.gate = nn.Linear(attention.hidden, inner, bias=False)
        if output:
            self.o = nn.Linear(inner, attention.hidden, bias=attention.o_bias and not self.own)

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options; RegraftError for sizes that are none, or that the attention layout does not have."""
        options = super().parse(spec)
        sizes = {
            name: value
            for name, value in vars(options).items()
            if name in (*OWN_LAYOUT_OPTIONS, "conv")
        }
        if wrong := next(
            (name for name, value in sizes.items() if value is not None and value < 1), None
        ):
            raise RegraftError(f"mixer '{cls.name}': {wrong} is {sizes[wrong]}, give 1 or more")
        if options.layout == "attention" and (
            extra := [name for name in OWN_LAYOUT_OPTIONS if name in spec]
        ):
            raise RegraftError(
                f"mixer '{cls.name}': {extra[0]} is {spec[extra[0]]}, but layout 'attention' has the attention's "
                "widths: leave it out"
            )
        return options

    @classmethod
    def widths_of(cls, attention: Attention, options: Any) -> Widths:
        """Heads, channels and states of a layout."""
        raise NotImplementedError

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The projections in and out; new ones as PyTorch starts a linear layer. RegraftError without an output."""
        options = cls.parse(spec)
        channels = cls.widths_of(attention, options).channels
        table = {"gate.weight": dense_weight("hidden", channels, attention.hidden)}
        if options.layout == "attention":
            table |= {
                f"qkv.{name}": weight
                for name, weight in Projections.weights(attention, expand=True).items()
            }
            return table | (output_weights(attention) if output else {})
        if not output:
            raise RegraftError(
                f"mixer '{cls.name}' with layout '{options.layout}' has an output projection of its own, which a "
                'window beside it cannot share: give --options \'{"layout": "attention"}\', or --window 0'
            )
        table["x.weight"] = dense_weight("hidden", channels, attention.hidden)
        return table | {
            "o.weight": dense_weight(channels, "hidden", options.expand * attention.hidden)
        }

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """The states of all channels and the last inputs of the convolution."""
        options = cls.parse(spec)
        widths = cls.widths_of(attention, options)
        return widths.inner * widths.state + (options.conv - 1) * cls.conv_channels(widths)

    @classmethod
    def conv_channels(cls, widths: Widths) -> int:
        """Channels that go through the convolution."""
        return widths.inner

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Decay, write, read out, and the convolution."""
        options = cls.parse(spec)
        widths = cls.widths_of(attention, options)
        return 5 * widths.inner * widths.state + 2 * options.conv * cls.conv_channels(widths)

    def apply_gate(self, y: Tensor, x: Tensor) -> Tensor:
        """y (batch, time, heads, dim) times silu of the gate's projection of x (batch, time, hidden)."""
        return y * F.silu(self.gate(x).float()).view_as(y)


def dense_weight(inputs: str, outputs: str, width: int) -> WeightSpec:
    """A new projection from `width` coordinates."""
    return WeightSpec(f"{inputs} -> {outputs}", fresh=f"uniform {width**-0.5:.6g}")


def no_decay_weight(weight: str, fresh: str) -> WeightSpec:
    """A new weight with a start of its own and no decay."""
    return WeightSpec(weight, fresh=fresh, decay=False)


class ShortConv(nn.Module):
    """Causal convolution of every channel with the last tokens of its document, then SiLU."""

    def __init__(self, channels: tuple[int, ...], taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*channels, taps))
        self.bias = nn.Parameter(torch.zeros(math.prod(channels)))

    @staticmethod
    def weights(name: str, channels: str, taps: int) -> dict[str, WeightSpec]:
        """Parameter name -> Weight; started as PyTorch does."""
        start = f"uniform {taps**-0.5:.6g}"
        return {
            f"{name}.weight": WeightSpec(f"{channels} {taps}", fresh=start),
            f"{name}.bias": no_decay_weight(f"-> {channels}", start),
        }

    def forward(
        self, x: Tensor, mixing: MixerContext, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x: (batch, time, channels) -> the same shape, and the last taps - 1 inputs: (batch, taps - 1, channels)."""
        weight, time = self.weight.flatten(0, -2), x.shape[1]
        before = weight.shape[1] - 1
        if mixing.valid is not None:
            x = x * mixing.valid.unsqueeze(-1)
        past = x.new_zeros(x.shape[0], before, x.shape[2]) if past is None else past.to(x.dtype)
        joined = torch.cat((past, x), 1)
        out = self.bias + x * weight[:, -1]
        for back in range(1, before + 1):
            earlier = joined[:, before - back : before - back + time]
            if mixing.segments is not None and back < time:
                same = mixing.segments[:, back:] == mixing.segments[:, :-back]
                earlier = earlier * F.pad(same, (back, 0), value=True).unsqueeze(-1)
            out = out + earlier * weight[:, -1 - back]
        if mixing.valid is not None:  # padding goes to the front, whatever side it was on
            seen = F.pad(mixing.valid, (before, 0), value=True)
            order = seen.long().argsort(dim=1, stable=True).unsqueeze(-1)
            joined = joined.gather(1, order.expand(joined.shape))
        return F.silu(out), joined[:, joined.shape[1] - before :]


def naive_scan(a: Tensor, u: Tensor, start: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + u_t, one token at a time; a, u: (batch, time, ...), start: h_0 (batch, ...) -> all h_t."""
    states = []
    for t in range(a.shape[1]):
        start = a[:, t] * start + u[:, t]
        states.append(start)
    return torch.stack(states, 1)


def scan(a: Tensor, u: Tensor, start: Tensor) -> Tensor:
    """`naive_scan` in place, a multiply-add per token forward and backward, keeping only a and h for the gradient.

    Nothing divides or exponentiates sums of decays, so that decays however strong are safe.
    """
    return _Scan.apply(a, u, start)


class _Scan(torch.autograd.Function):
    """The gradient of the states runs through the same recurrence backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, start: Tensor) -> Tensor:
        h = u.clone()
        h[:, 0].addcmul_(a[:, 0], start)
        for t in range(1, a.shape[1]):
            h[:, t].addcmul_(a[:, t], h[:, t - 1])
        ctx.save_for_backward(a, h, start)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, start = ctx.saved_tensors
        back = grads[0].clone()
        for t in range(a.shape[1] - 2, -1, -1):
            back[:, t].addcmul_(a[:, t + 1], back[:, t + 1])
        decays = torch.empty_like(a)
        torch.mul(back[:, 0], start, out=decays[:, 0])
        torch.mul(back[:, 1:], h[:, :-1], out=decays[:, 1:])
        return decays, back, a[:, 0] * back[:, 0]
