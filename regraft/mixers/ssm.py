"""What state-space mixers share: two layouts, the short convolution, an elementwise recurrence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention
from .base import Mixer, MixerContext, output_weights, projection_weights
from .weight_spec import WeightSpec

DT_INIT = "timesteps 0.001 0.1"
# Options of layout `own`; in the other layout the sizes of the attention decide them.
OWN_LAYOUT_OPTIONS = ("expand", "state", "head_dim")


@dataclass(frozen=True)
class SsmOptions:
    """Layout and sizes of a state-space mixer.

    Layout `own` is the paper's block, all of it new. Layout `attention` (MambaInLlama, arXiv
    2408.15237) takes the source's projections: the values are the input x, keys are B, queries are
    C, and the output projection is the source's, so that heads and their width are the attention's.
    """

    layout: Literal["own", "attention"] = "own"
    expand: int = 2  # channels per coordinate of the residual stream, layout `own`
    state: int = 16  # numbers of state per channel, layout `own`
    conv: int = 4  # taps of the convolution


@dataclass(frozen=True)
class Widths:
    """Sizes of a state-space block, and the named axes of its weights."""

    heads: int
    dim: int  # channels of a head
    state: int  # numbers of state per channel
    channels: str  # axes of all channels
    head: str  # axes of one number per head
    keys: str  # axes of B and C

    @property
    def inner(self) -> int:
        """Number of channels."""
        return self.heads * self.dim


class StateSpace(Mixer):
    """A gated state-space block.

    Subclasses add what makes B, C and the time step of a token, and the recurrence. Nothing is
    rotated: in the attention layout the source's rotary embedding is left out, as in MambaInLlama.
    """

    takes_alibi = False

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        # The output projection is made below: it may be wider than the attention's.
        self.own = self.parse(spec).layout == "own"
        super().__init__(attention, spec, output=output and not self.own)
        self.widths = self.widths_of(attention, self.options)
        inner = self.widths.inner
        if self.own:
            self.x = nn.Linear(attention.hidden, inner, bias=False)
        else:
            self.add_projections(expand=True)
        self.gate = nn.Linear(attention.hidden, inner, bias=False)
        if output:
            bias = attention.o_bias and not self.own
            self.o_proj = nn.Linear(inner, attention.hidden, bias=bias)

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options of a spec.

        Raises RegraftError for an unknown option, a wrong type, a size below 1, or a size that
        layout `attention` does not let choose.
        """
        options = super().parse(spec)
        for name, value in vars(options).items():
            is_size = name in (*OWN_LAYOUT_OPTIONS, "conv")
            if is_size and value is not None and value < 1:
                raise RegraftError(f"mixer '{cls.name}': {name} is {value}, give 1 or more")

        extra = [name for name in OWN_LAYOUT_OPTIONS if name in spec]
        if options.layout == "attention" and extra:
            raise RegraftError(
                f"mixer '{cls.name}': {extra[0]} is {spec[extra[0]]}, but layout 'attention' has "
                "the attention's widths: leave it out"
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
        """The projections in and out; new ones start as PyTorch starts a linear layer.

        Raises RegraftError for layout `own` without an output projection.
        """
        options = cls.parse(spec)
        channels = cls.widths_of(attention, options).channels
        table = {"gate.weight": dense_weight("hidden", channels, attention.hidden)}
        if options.layout == "attention":
            table |= projection_weights(attention, expand=True)
            return table | (output_weights(attention) if output else {})

        if not output:
            raise RegraftError(
                f"mixer '{cls.name}' with layout '{options.layout}' has an output projection of "
                "its own, which a window beside it cannot share: give --options "
                '\'{"layout": "attention"}\', or --window 0'
            )
        table["x.weight"] = dense_weight("hidden", channels, attention.hidden)
        return table | {
            "o_proj.weight": dense_weight(channels, "hidden", options.expand * attention.hidden)
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

    def apply_gate(
        self,
        y: Float[Tensor, "batch time heads dim"],
        x: Float[Tensor, "batch time hidden"],
    ) -> Float[Tensor, "batch time heads dim"]:
        """`y` times silu of the gate's projection of `x`."""
        return y * F.silu(self.gate(x).float()).view_as(y)


def dense_weight(inputs: str, outputs: str, width: int) -> WeightSpec:
    """A new projection from `width` coordinates, started as PyTorch starts a linear layer."""
    return WeightSpec(f"{inputs} -> {outputs}", fresh=f"uniform {width**-0.5:.6g}")


def no_decay_weight(weight: str, fresh: str) -> WeightSpec:
    """A new weight with a start of its own and no decay."""
    return WeightSpec(weight, fresh=fresh, decay=False)


class ShortConv(nn.Module):
    """Causal convolution of every channel with the last tokens of its document, then SiLU."""

    def __init__(self, channels: tuple[int, ...], taps: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*channels, taps))
        self.bias = nn.Parameter(torch.zeros(math.prod(channels))) if bias else None

    @staticmethod
    def weights(
        name: str, channels: str, taps: int, start: str | None = None, bias: bool = True
    ) -> dict[str, WeightSpec]:
        """Parameter name -> WeightSpec.

        Args:
            name: of the convolution.
            channels: their named axes.
            taps: of the convolution.
            start: initial value of the weight, whose bias starts at zero; None: as PyTorch starts a
                convolution.
            bias: whether there is one.
        """
        usual = f"uniform {taps**-0.5:.6g}"
        weight = WeightSpec(f"{channels} {taps}", fresh=start or usual, decay=start is None)
        return {
            f"{name}.weight": weight,
            **(
                {f"{name}.bias": no_decay_weight(f"-> {channels}", "zeros" if start else usual)}
                if bias
                else {}
            ),
        }

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        mixing: MixerContext,
        past: Float[Tensor, "batch before channels"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch before channels"]]:
        """(outputs, last `taps - 1` inputs, which are `past` of the next call).

        Args:
            x: inputs.
            mixing: padding and documents of these tokens.
            past: the `taps - 1` inputs before the first token; None: zeros.
        """
        weight, time = self.weight.flatten(0, -2), x.shape[1]
        before = weight.shape[1] - 1
        if mixing.valid is not None:
            x = x * mixing.valid.unsqueeze(-1)
        past = x.new_zeros(x.shape[0], before, x.shape[2]) if past is None else past.to(x.dtype)
        joined = torch.cat((past, x), 1)

        # One tap at a time: an input of another document counts as zero.
        out = x * weight[:, -1] if self.bias is None else self.bias + x * weight[:, -1]
        for distance in range(1, before + 1):
            earlier = joined[:, before - distance : before - distance + time]
            if mixing.segments is not None and distance < time:
                same = mixing.segments[:, distance:] == mixing.segments[:, :-distance]
                earlier = earlier * F.pad(same, (distance, 0), value=True).unsqueeze(-1)
            out = out + earlier * weight[:, -1 - distance]

        # A stable sort moves padding to the front, whatever side it was on.
        if mixing.valid is not None:
            seen = F.pad(mixing.valid, (before, 0), value=True)
            order = seen.long().argsort(dim=1, stable=True).unsqueeze(-1)
            joined = joined.gather(1, order.expand(joined.shape))
        return F.silu(out), joined[:, joined.shape[1] - before :]


def naive_scan(
    a: Float[Tensor, "batch time ..."],
    u: Float[Tensor, "batch time ..."],
    start: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch time ..."]:
    """All h_t of h_t = a_t h_{t-1} + u_t, elementwise, one token at a time; `start` is h_0."""
    states = []
    for t in range(a.shape[1]):
        start = a[:, t] * start + u[:, t]
        states.append(start)
    return torch.stack(states, 1)


def scan(
    a: Float[Tensor, "batch time ..."],
    u: Float[Tensor, "batch time ..."],
    start: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch time ..."]:
    """`naive_scan` in place: a multiply-add per token, forward and backward.

    Only a and h are kept for the gradient. Nothing divides or exponentiates sums of decays, so
    that decays of any strength are safe.
    """
    return _Scan.apply(a, u, start)


class _Scan(torch.autograd.Function):
    """`scan` with its gradient, which runs through the same recurrence backwards."""

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

        # dL/dh_t gathers what reaches it through h_{t+1} = a_{t+1} h_t + u_{t+1}.
        grad = grads[0].clone()
        for t in range(a.shape[1] - 2, -1, -1):
            grad[:, t].addcmul_(a[:, t + 1], grad[:, t + 1])

        # dL/da_t = dL/dh_t h_{t-1}, dL/du_t = dL/dh_t, dL/dh_0 = a_1 dL/dh_1.
        decays = torch.empty_like(a)
        torch.mul(grad[:, 0], start, out=decays[:, 0])
        torch.mul(grad[:, 1:], h[:, :-1], out=decays[:, 1:])
        return decays, grad, a[:, 0] * grad[:, 0]
