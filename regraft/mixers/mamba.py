"""Mamba: a selective state-space model with a decay for every number of its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention
from .base import MixerContext, State
from .ssm import (
    DT_INIT,
    ShortConv,
    SsmOptions,
    StateSpace,
    Widths,
    dense_weight,
    naive_scan,
    no_decay_weight,
    scan,
)
from .tensors import keep_finite
from .weight_spec import WeightSpec


class Mamba(StateSpace):
    """S6 (Gu & Dao, arXiv 2312.00752, algorithm 2).

    h_t = exp(dt A) h_{t-1} + dt B_t x_t, y_t = C_t h_t + D x_t per channel: x after convolution and
    SiLU, A = -exp(A_log) started at -1, -2, ..., D at one, the step dt = softplus of a projection
    of low rank, its bias started so that dt is log-uniform on (0.001, 0.1); y times silu(gate).

    In layout `own` B, C and dt read x. In layout `attention` B and C are the source's keys and
    queries, with one state per head, and dt reads the layer's input.
    """

    name = "mamba"
    Options = SsmOptions

    def __init__(self, attention: Attention, spec: dict[str, object], output: bool = True):
        super().__init__(attention, spec, output)
        widths, hidden = self.widths, attention.hidden
        channels = (widths.inner,) if self.own else (widths.heads, widths.dim)
        self.conv = ShortConv(channels, self.options.conv)
        if self.own:
            self.b = nn.Linear(widths.inner, widths.state, bias=False)
            self.c = nn.Linear(widths.inner, widths.state, bias=False)
        self.low = nn.Linear(widths.inner if self.own else hidden, dt_rank(hidden), bias=False)
        self.dt = nn.Linear(dt_rank(hidden), widths.inner)
        self.A_log = nn.Parameter(torch.zeros(*channels, widths.state))
        self.D = nn.Parameter(torch.ones(widths.inner))

    @classmethod
    def widths_of(cls, attention: Attention, options: SsmOptions) -> Widths:
        """All channels as one head that shares B and C, or the attention's heads."""
        if options.layout == "attention":
            axes = f"kv group {attention.value_axis}", "kv group", "dim"
            return Widths(attention.heads, attention.value_dim, attention.dim, *axes)
        inner = options.expand * attention.hidden
        return Widths(1, inner, options.state, str(inner), "1", str(options.state))

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, object], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Convolution, B, C, steps, A and D beside the projections; no decay on A, D and biases."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        widths, low = cls.widths_of(attention, options), dt_rank(attention.hidden)

        reads, width = ("hidden", attention.hidden)  # what makes the time step
        if options.layout == "own":
            reads, width = widths.channels, widths.inner
            table |= {f"{name}.weight": dense_weight(reads, widths.keys, width) for name in "bc"}

        table |= ShortConv.weights("conv", widths.channels, options.conv)
        table |= {
            "low.weight": dense_weight(reads, str(low), width),
            "dt.weight": dense_weight(str(low), widths.channels, low),
        }
        table |= {
            "dt.bias": no_decay_weight(f"-> {widths.channels}", DT_INIT),
            "D": no_decay_weight(f"-> {widths.channels}", "ones"),
        }
        return table | {"A_log": no_decay_weight(f"{widths.channels} {widths.keys}", "log_counts")}

    @classmethod
    def row_flops(
        cls, attention: Attention, spec: dict[str, object], length: int
    ) -> tuple[int, int]:
        """Reading the states; decays and writes are no matrix products."""
        widths = cls.widths_of(attention, cls.parse(spec))
        forward = 2 * length * widths.inner * widths.state
        return forward, 2 * forward

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the states; see `Mixer.mix`. In layout `own` there is one head."""
        state, heads = state or {}, (self.widths.heads, self.widths.dim)

        # values: (batch, time, channels), b and c: (batch, time, heads, state)
        if self.own:
            values, conv = self.conv(self.x(x), mixing, state.get("conv"))
            b, c = self.b(values).unsqueeze(2), self.c(values).unsqueeze(2)
        else:
            c, b, values = (t.transpose(1, 2) for t in self.qkv(x))
            values, conv = self.conv(values.flatten(2), mixing, state.get("conv"))
        dt = F.softplus(self.dt(self.low(values if self.own else x)).float()).unflatten(-1, heads)

        # Decays and writes, (batch, time, heads, dim, state).
        values, b, c = values.float().unflatten(-1, heads), b.float(), c.float()
        a = (dt.unsqueeze(-1) * -self.A_log.float().exp().view(*heads, -1)).exp()
        u = (dt * values).unsqueeze(-1) * b.unsqueeze(-2)

        # Padding keeps the state and writes nothing; a document's first token forgets it all.
        if mixing.valid is not None:
            valid = mixing.valid[:, :, None, None, None]
            a, u = a.masked_fill(~valid, 1.0), u * valid
        if mixing.segments is not None:
            begins = mixing.segments[:, 1:] != mixing.segments[:, :-1]
            a = a.masked_fill(F.pad(begins, (1, 0))[:, :, None, None, None], 0.0)

        start = state["matrix"] if state else torch.zeros_like(u[:, 0])
        h = (naive_scan if x.shape[1] == 1 else scan)(a, u, start)
        y = (h @ c.unsqueeze(-1)).squeeze(-1) + self.D.float().view(heads) * values
        return keep_finite(self.apply_gate(y, x), x.dtype), {"conv": conv, "matrix": h[:, -1]}


def dt_rank(hidden: int) -> int:
    """Rank of the projection that gives the steps."""
    return -(-hidden // 16)
