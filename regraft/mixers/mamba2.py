"""Mamba-2: a state-space model with one decay per head, a form of linear attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention
from .base import MixerContext, State
from .dispatch import recur
from .recurrence import chunked_flops
from .ssm import DT_INIT, ShortConv, SsmOptions, StateSpace, Widths, dense_weight, no_decay_weight
from .tensors import mask_padding
from .weight_spec import WeightSpec

EPS = 1e-5
# Of the values before SiLU, which is nearly the identity so far from zero.
SPREAD, OFFSET = 2.0, 8.0
GATE = 3.0  # where silu is positive and nearly constant
HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 256.0, 2048.0)  # tokens
UNIT_STEP = math.log(math.expm1(1.0))  # softplus of it is 1


@dataclass(frozen=True)
class Mamba2Options(SsmOptions):
    """As `SsmOptions`, the width of a head, the norm and the start."""

    state: int = 128
    # Channels of a head in layout `own`; as wide as the source's heads by default.
    head_dim: int | None = None
    # Channels that the norm takes together: `all`, or those of each `head`, as in a stock Mamba-2
    # layer whose heads have B and C of their own (layout `attention`).
    norm: Literal["all", "head"] = "all"
    # Added to the mean square in the norm; `source`: what the source's norms add, which stock
    # classes add to all of theirs.
    eps: float | Literal["source"] = EPS
    # `paper`: convolutions and steps start random, as published. `identity`: convolutions pass
    # their input, steps have length 1 and read nothing, and nothing is added past the state (D).
    # Calibration then makes of a norm per head a denominator (`Mamba2.fit_inputs`).
    start: Literal["paper", "identity"] = "paper"


class Mamba2(StateSpace):
    """SSD (Dao & Gu, arXiv 2405.21060, section 7).

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t. x, B and C go through the
    convolution and SiLU; per head A = -exp(A_log) with -A started uniform on (1, 16), D at one and
    dt = softplus(W x_t + b), b started so that dt is log-uniform on (0.001, 0.1). The output is the
    RMS norm of y times silu(gate), with a gain. In layout `own` all heads share B and C.

    Deviation: option `norm` makes it a norm per head, as the paper's does under tensor parallelism
    (section 8.1).
    """

    name = "mamba2"
    Options = Mamba2Options

    def __init__(self, attention: Attention, spec: dict[str, object], output: bool = True):
        super().__init__(attention, spec, output)
        widths, taps = self.widths, self.options.conv
        channels = (widths.inner,) if self.own else (widths.heads, widths.dim)
        keys = (widths.state,) if self.own else (widths.heads, widths.state)
        if self.own:
            self.b = nn.Linear(attention.hidden, widths.state, bias=False)
            self.c = nn.Linear(attention.hidden, widths.state, bias=False)
        self.conv_x, self.conv_b, self.conv_c = (
            ShortConv(shape, taps) for shape in (channels, keys, keys)
        )

        self.dt = nn.Linear(attention.hidden, widths.heads)
        self.A_log = nn.Parameter(torch.zeros(widths.heads))
        self.D = nn.Parameter(torch.ones(widths.heads))
        self.norm = nn.Parameter(torch.ones(widths.inner))

    @classmethod
    def widths_of(cls, attention: Attention, options: Mamba2Options) -> Widths:
        """Heads of `head_dim` channels that share B and C, or the attention's heads.

        Raises RegraftError when `head_dim` does not divide the channels.
        """
        if options.layout == "attention":
            axes = (f"kv group {attention.value_axis}", "kv group", "kv group dim")
            return Widths(attention.heads, attention.value_dim, attention.dim, *axes)

        inner, dim = options.expand * attention.hidden, options.head_dim or attention.value_dim
        if inner % dim:
            raise RegraftError(
                f"mixer '{cls.name}': head_dim {dim} does not divide {inner} channels (expand "
                f"{options.expand} times {attention.hidden}): give a head_dim that does"
            )
        heads, state = inner // dim, options.state
        return Widths(heads, dim, state, str(inner), str(heads), str(state))

    @classmethod
    def conv_channels(cls, widths: Widths) -> int:
        """Channels of x, B and C."""
        # Axes that are a number are shared by all heads: layout `own`.
        heads = 1 if widths.keys.isdigit() else widths.heads
        return widths.inner + 2 * heads * widths.state

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, object], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The projections, convolutions, steps, A, D and the norm.

        Weight decay does not act on A, D, the gain and biases.
        """
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        widths = cls.widths_of(attention, options)
        if options.layout == "own":
            for name in "bc":
                table[f"{name}.weight"] = dense_weight("hidden", widths.keys, attention.hidden)
        identity = options.start == "identity"
        begin = "last_tap" if identity else None
        for name, axes in (("x", widths.channels), ("b", widths.keys), ("c", widths.keys)):
            table |= ShortConv.weights(f"conv_{name}", axes, options.conv, begin)

        step = dense_weight("hidden", widths.head, attention.hidden)
        return table | {
            "dt.weight": replace(step, fresh="zeros") if identity else step,
            "dt.bias": no_decay_weight(
                f"-> {widths.head}", f"constant {UNIT_STEP!r}" if identity else DT_INIT
            ),
            "A_log": no_decay_weight(
                f"-> {widths.head}", "constant -3" if identity else "log_uniform 1 16"
            ),
            "D": no_decay_weight(f"-> {widths.head}", "zeros" if identity else "ones"),
            "norm": no_decay_weight(f"gain {widths.channels}", "ones"),
        }

    @classmethod
    def row_flops(
        cls, attention: Attention, spec: dict[str, object], length: int
    ) -> tuple[int, int]:
        """The chunked recurrence."""
        widths = cls.widths_of(attention, cls.parse(spec))
        return chunked_flops(widths.heads, 1, widths.state, widths.dim, length, delta=False)

    @torch.no_grad()
    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Half-life at the initial steps = mean distance: A = ln 2 / (distance dt)."""
        step = F.softplus(self.dt.bias)
        self.A_log.copy_((torch.log(torch.tensor(2.0)) / distance.clamp(min=1.0) / step).log())

    @property
    def half_lives(self) -> Float[Tensor, "candidates states"] | None:
        """Half-lives in tokens that calibration tries; None for steps that start at random."""
        if self.options.start != "identity":
            return None
        tried = torch.tensor(HALF_LIVES, device=self.A_log.device)
        return tried.unsqueeze(-1).expand(-1, self.widths.heads)

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " states"]) -> None:
        """A = ln 2 / (tokens dt), for the steps of an input of zero."""
        self.A_log.copy_((math.log(2.0) / tokens / F.softplus(self.dt.bias)).log())

    @torch.no_grad()
    def fit_inputs(self, inputs: Float[Tensor, "rows hidden"]) -> None:
        """Make the norm per head a denominator (this project), with start `identity`.

        With a large c, silu(v + c) is about v + c, and the state gives sum_j w_j (v_j + c), which
        is about c sum_j w_j in every channel. Its root mean square is that too: divided by it the
        output is 1 + (a mean of the values, less its own mean over channels) / c. What the gate
        multiplies a whole head by cancels, so it is the projection nearest to a constant.
        """
        if self.own or (self.options.start, self.options.norm) != ("identity", "head"):
            return
        rows = inputs.float()
        values = self.qkv(inputs.unsqueeze(0))[2].float()  # (1, heads, rows, dim)
        scale = SPREAD / values.square().mean((0, 2, 3)).sqrt().clamp(min=1e-6)  # (heads,)
        weight, bias = self.value_rows()
        weight.mul_(scale.view(-1, 1, 1).to(weight.dtype))
        if bias is not None:
            bias.mul_(scale.view(-1, 1).to(bias.dtype))
        assert self.conv_x.bias is not None
        self.conv_x.bias.fill_(OFFSET)

        gram = rows.T @ rows
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        constant = torch.linalg.solve(gram, rows.sum(0))
        self.gate.weight.copy_((GATE * constant).expand_as(self.gate.weight))

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, past: State
    ) -> tuple[dict[str, Tensor], State]:
        """(what the recurrence reads, states of the convolutions).

        What it reads: C as `q`, B as `k`, `values` and `dt` (batch, heads, time, ...), and the
        log-decay `g` (batch, heads, time).
        """
        widths, new = self.widths, {}
        if self.own:
            parts = {"x": self.x(x), "b": self.b(x), "c": self.c(x)}
        else:
            # Queries are C, keys B, values x, as in linear attention.
            qkv = zip("cbx", self.qkv(x), strict=True)
            parts = {name: t.transpose(1, 2).flatten(2) for name, t in qkv}
        for name, conv in (("x", self.conv_x), ("b", self.conv_b), ("c", self.conv_c)):
            parts[name], new[f"conv_{name}"] = conv(parts[name], mixing, past.get(f"conv_{name}"))

        values = parts["x"].float().unflatten(-1, (widths.heads, widths.dim))
        b, c = (parts[n].float().unflatten(-1, (-1, widths.state)).transpose(1, 2) for n in "bc")
        b, c = (t.expand(-1, widths.heads, -1, -1) for t in (b, c))
        dt = F.softplus(self.dt(x).float())
        g = (-self.A_log.float().exp() * dt).transpose(1, 2)
        read = {
            "q": c,
            "k": b,
            "values": values.transpose(1, 2),
            "dt": dt.transpose(1, 2).unsqueeze(-1),
            "g": g,
        }
        return read, new

    def matrix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> Float[Tensor, "batch heads time time"]:
        """How values are mixed over tokens, D on the diagonal; see `Mixer.matrix`."""
        read, _ = self.inputs(x, mixing, {})
        eye = torch.eye(x.shape[1], device=x.device)
        values = read["dt"] * eye  # value number i is one at token i and zero elsewhere
        out, _ = recur(read["q"], read["k"], values, read["g"], None, mixing.segments, None)
        return out + self.D.float().view(-1, 1, 1) * eye

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the states; see `Mixer.mix`."""
        widths, past = self.widths, state or {}
        read, new = self.inputs(x, mixing, past)
        b, v, g = mask_padding(mixing.valid, read["k"], read["dt"] * read["values"], read["g"])
        out, new["matrix"] = recur(read["q"], b, v, g, None, mixing.segments, past.get("matrix"))

        # The norm comes after the gate.
        y = (out + self.D.float().view(-1, 1, 1) * read["values"]).transpose(1, 2)
        y = self.apply_gate(y, x)
        together = (-1,) if self.options.norm == "head" else (-2, -1)
        y = y * torch.rsqrt(y.square().mean(together, keepdim=True) + float(self.options.eps))
        y = y * self.norm.float().view(widths.heads, widths.dim)
        return y.to(x.dtype), new
