"""Mamba-2: a state-space model with one decay per head, which is linear attention with data-dependent decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegraftError
from .base import Attention, MixerContext, State, WeightSpec, mask_padding
from .dispatch import recur
from .recurrence import chunked_flops
from .ssm import DT_INIT, ShortConv, SsmOptions, StateSpace, Widths, dense_weight, no_decay_weight

EPS = 1e-5


@dataclass(frozen=True)
class Mamba2Options(SsmOptions):
    """As `SsmOptions`; `head_dim`: channels of a head in layout `own`, as wide as the source's heads by default."""

    state: int = 128
    head_dim: int | None = None


class Mamba2(StateSpace):
    """SSD (Dao & Gu, arXiv 2405.21060, section 7): S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t.

    x, B and C go through the convolution and SiLU; per head A = -exp(A_log) with -A started uniform on (1, 16), D at
    one and dt = softplus(W x_t + b), b started so that dt is log-uniform on (0.001, 0.1). The output is the RMS norm
    of y times silu(gate), with a gain. In layout `own` all heads share B and C.
    """

    name = "mamba2"
    Options = Mamba2Options

    def __init__(self, attention: Attention, spec: dict[str, object], output: bool = True):
        super().__init__(attention, spec, output)
        widths, taps = self.widths, self.options.conv
        channels = (widths.inner,) if self.own else (widths.heads, widths.dim)
        keys = (widths.state,) if self.own else channels
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
        """Heads of `head_dim` channels that share B and C, or the attention's."""
        if options.layout == "attention":
            return Widths(
                attention.heads,
                attention.dim,
                attention.dim,
                "kv group dim",
                "kv group",
                "kv group dim",
            )
        inner, dim = options.expand * attention.hidden, options.head_dim or attention.dim
        if inner % dim:
            raise RegraftError(
                f"mixer '{cls.name}': head_dim {dim} does not divide {inner} channels (expand {options.expand} times "
                f"{attention.hidden}): give a head_dim that does"
            )
        return Widths(
            inner // dim, dim, options.state, str(inner), str(inner // dim), str(options.state)
        )

    @classmethod
    def conv_channels(cls, widths: Widths) -> int:
        """x, B and C."""
        return widths.inner + 2 * (widths.state if widths.keys.isdigit() else widths.inner)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, object], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Convolutions, steps, A, D and the norm beside the projections; no decay on A, D, gain and biases."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        widths = cls.widths_of(attention, options)
        if options.layout == "own":
            table |= {
                f"{name}.weight": dense_weight("hidden", widths.keys, attention.hidden)
                for name in "bc"
            }
        for name, axes in (("x", widths.channels), ("b", widths.keys), ("c", widths.keys)):
            table |= ShortConv.weights(f"conv_{name}", axes, options.conv)
        table |= {
            "dt.weight": dense_weight("hidden", widths.head, attention.hidden),
            "dt.bias": no_decay_weight(f"-> {widths.head}", DT_INIT),
        }
        table |= {
            "A_log": no_decay_weight(f"-> {widths.head}", "log_uniform 1 16"),
            "D": no_decay_weight(f"-> {widths.head}", "ones"),
        }
        return table | {"norm": no_decay_weight(f"gain {widths.channels}", "ones")}

    @classmethod
    def row_flops(
        cls, attention: Attention, spec: dict[str, object], length: int
    ) -> tuple[int, int]:
        """The chunked recurrence."""
        widths = cls.widths_of(attention, cls.parse(spec))
        return chunked_flops(widths.heads, 1, widths.state, widths.dim, length, delta=False)

    @torch.no_grad()
    def start_gates(self, distance: Tensor, entropy: Tensor) -> None:
        """In the attention layout: half-life at the steps' start = mean distance, A = ln 2 / (distance dt)."""
        step = F.softplus(self.dt.bias)
        self.A_log.copy_((torch.log(torch.tensor(2.0)) / distance.clamp(min=1.0) / step).log())

    def inputs(
        self, x: Tensor, mixing: MixerContext, past: State
    ) -> tuple[dict[str, Tensor], State]:
        """(C as q, B as k, values, dt and g, each (batch, heads, time, ..); states of the convolutions)."""
        widths, new = self.widths, {}
        if self.own:
            parts = {"x": self.x(x), "b": self.b(x), "c": self.c(x)}
        else:
            parts = {
                name: t.transpose(1, 2).flatten(2)
                for name, t in zip("cbx", self.qkv(x), strict=True)
            }
        for name, conv in (("x", self.conv_x), ("b", self.conv_b), ("c", self.conv_c)):
            parts[name], new[f"conv_{name}"] = conv(parts[name], mixing, past.get(f"conv_{name}"))
        values = parts["x"].float().unflatten(-1, (widths.heads, widths.dim))
        b, c = (parts[n].float().unflatten(-1, (-1, widths.state)).transpose(1, 2) for n in "bc")
        b, c = (t.expand(-1, widths.heads, -1, -1) for t in (b, c))
        dt = F.softplus(self.dt(x).float())
        g = (-self.A_log.float().exp() * dt).transpose(1, 2)
        made = {
            "q": c,
            "k": b,
            "values": values.transpose(1, 2),
            "dt": dt.transpose(1, 2).unsqueeze(-1),
            "g": g,
        }
        return made, new

    def matrix(self, x: Tensor, mixing: MixerContext) -> Tensor:
        """As in the base class, D on the diagonal."""
        made, _ = self.inputs(x, mixing, {})
        eye = torch.eye(x.shape[1], device=x.device)
        out, _ = recur(
            made["q"], made["k"], made["dt"] * eye, made["g"], None, mixing.segments, None
        )
        return out + self.D.float().view(-1, 1, 1) * eye

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim) and the states."""
        widths, past = self.widths, state or {}
        made, new = self.inputs(x, mixing, past)
        b, v, g = mask_padding(mixing.valid, made["k"], made["dt"] * made["values"], made["g"])
        out, new["matrix"] = recur(made["q"], b, v, g, None, mixing.segments, past.get("matrix"))
        y = self.apply_gate(
            (out + self.D.float().view(-1, 1, 1) * made["values"]).transpose(1, 2), x
        ).flatten(2)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * self.norm.float()
        return y.unflatten(-1, (widths.heads, widths.dim)).to(x.dtype), new
