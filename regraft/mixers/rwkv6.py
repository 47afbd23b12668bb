"""RWKV-6's time mixing, each of its mechanisms optional: token shift, decay, bonus, norm, gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention
from .base import MixerContext, State
from .decays import start_decays
from .latent import refuse_latent
from .linear import LinearAttention, LinearOptions, low_rank_weights, mean_decay
from .tensors import keep_finite
from .vector import PAIRS
from .weight_spec import WeightSpec


@dataclass(frozen=True)
class Rwkv6Options(LinearOptions):
    """As `LinearOptions`, and the mechanisms of RWKV-6.

    RADLADS' form, without the mechanisms that a teacher lacks, is {"shift": false, "bonus": false,
    "balance": true, "norm": "none", "gate": "sigmoid", "grouped": true, "rotary": true}.
    """

    rotary: bool = False
    norm: Literal["none", "rms", "layer"] = "layer"
    gate: Literal["none", "silu", "sigmoid"] = "silu"
    # Dynamic: depends on the token, through a map of `rank`. Static: RWKV-5's.
    decay: Literal["dynamic", "static"] = "dynamic"
    rank: int = 64
    # Each projection reads a mix of a token and the one before it; the mix depends on both, through
    # a map of `shift_rank`.
    shift: bool = True
    shift_rank: int = 32
    # A weight per coordinate for the current token.
    bonus: bool = True
    # Keys times one minus decay.
    balance: bool = False


class Rwkv6(LinearAttention):
    """RWKV-6 (Peng et al., arXiv 2404.05892, section 4.2) on the source's projections.

    Each of r (the queries), k, v, g and w reads x_t + (x_{t-1} - x_t) * lora(x_t + (x_{t-1} - x_t)
    * mu_x), where lora(x) = lambda + tanh(x A) B; w_t = exp(-exp(lora(x^w_t))); o_t = (S_{t-1} +
    diag(u) k_t v_t^T)^T r_t and S_t = diag(w_t) S_{t-1} + k_t v_t^T; the layer gives W_O
    (silu(W_G x^g_t) * GroupNorm(o_t)). Shifts begin at zero, u at one. Queries are scaled by
    1/sqrt(dim), as in RADLADS (arXiv 2505.03005). Without bonus o_t = S_t^T r_t.
    """

    name = "rwkv6"
    Options = Rwkv6Options
    gain = "kv group dim"
    bias = True
    pairs = PAIRS

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        options, hidden, dim = self.options, attention.hidden, attention.dim
        self.streams = self.shifted_streams(options)

        if options.shift:
            count, rank = len(self.streams), options.shift_rank
            self.shift_base = nn.Parameter(torch.zeros(hidden))
            self.shift_bias = nn.Parameter(torch.zeros(count, hidden))
            self.shift_in = nn.Linear(hidden, count * rank, bias=False)
            self.shift_out = nn.Parameter(torch.zeros(count, rank, hidden))

        if options.decay == "dynamic":
            self.decay_in = nn.Linear(hidden, options.rank, bias=False)
            self.decay_out = nn.Linear(options.rank, self.states * dim)
        else:
            self.decay = nn.Parameter(torch.zeros(self.states * dim))
        self.bonus = nn.Parameter(torch.zeros(self.states, dim)) if options.bonus else None

    @classmethod
    def shifted_streams(cls, options: Rwkv6Options) -> str:
        """Letters of what reads the input: r, k, v, with w for a dynamic decay and g for a gate."""
        return "rkv" + "w" * (options.decay == "dynamic") + "g" * (options.gate != "none")

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """No shift at first, a constant decay: a half-life of about 44 tokens, or ALiBi's."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        if options.shift:
            why = "the shift mixes them apart: give --options '{\"shift\": false}'"
            refuse_latent(attention, "'rwkv6' with shift", why)
        axes = f"{cls.state_axes(options)} dim"

        # The second map of the shift starts at zero: no token is mixed with the one before it.
        if options.shift:
            count, rank = len(cls.shifted_streams(options)), options.shift_rank
            table["shift_base"] = WeightSpec("scale hidden", fresh="zeros", decay=False)
            table["shift_bias"] = WeightSpec(f"{count} hidden", fresh="zeros", decay=False)
            table["shift_in.weight"] = WeightSpec(
                f"hidden -> {count * rank}", fresh="normal 0.02", decay=False
            )
            table["shift_out"] = WeightSpec(f"{count} {rank} hidden", fresh="zeros", decay=False)

        start = start_decays(attention, "log", "constant -4.15")
        if options.decay == "dynamic":
            table |= low_rank_weights("decay", options.rank, axes, start)
        else:
            table["decay"] = WeightSpec(f"-> {axes}", fresh=start, decay=False)
        if options.bonus:
            table["bonus"] = WeightSpec(axes, fresh="ones", decay=False)
        return table

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """The matrices, and the last token's input for the shift."""
        return super().state_size(attention, spec) + attention.hidden * cls.parse(spec).shift

    @classmethod
    def token_flops(cls, attention: Attention, options: Rwkv6Options) -> int:
        """The shift's second map."""
        count = len(cls.shifted_streams(options)) * options.shift
        return 2 * count * options.shift_rank * attention.hidden

    @torch.no_grad()
    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Half-life = mean distance, as in `gated_deltanet`."""
        base = self.decay_out.bias if self.options.decay == "dynamic" else self.decay
        base.copy_(mean_decay(distance, self.states).log().repeat_interleave(self.attention.dim))

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the state: `matrix`, and `shift`, the last token's input."""
        read, last = dict.fromkeys(self.streams, x), {}
        if self.options.shift:
            before, last["shift"] = token_shift(x, mixing, state["shift"] if state else None)
            mixes = self.shifts(x, before - x)
            read = {name: x + (before - x) * mixes[:, :, i] for i, name in enumerate(self.streams)}

        inputs = self.recurrence_inputs(read, mixing)
        start = state["matrix"] if state else None
        out, last["matrix"] = self.run_recurrence(inputs, mixing, start)
        return keep_finite(self.normalize_and_gate(out, read.get("g", x)), x.dtype), last

    def shifts(
        self, x: Float[Tensor, "batch time hidden"], change: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time streams hidden"]:
        """The share of `change`, from a token to the one before, that each stream takes."""
        low_rank = self.shift_in(x + change * self.shift_base).tanh()
        inner = low_rank.unflatten(-1, (len(self.streams), -1))
        return self.shift_bias + torch.einsum("btsr,srh->btsh", inner, self.shift_out)

    def recurrence_inputs(
        self, read: dict[str, Float[Tensor, "batch time hidden"]], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Arguments of the recurrence, from what each stream reads."""
        q, k, v = self.qkv(*(read[name] for name in "rkv"))
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)

        # The log-decay of each key dimension, (batch, states, time, dim), is -exp(base).
        if "w" in read:
            base = self.decay_out(self.decay_in(read["w"]).tanh())
        else:
            base = self.decay.expand(*read["k"].shape[:2], -1)
        g = -base.float().exp().unflatten(-1, (self.states, -1)).transpose(1, 2)

        k = k * -g.expm1() if self.options.balance else k
        inputs = {"q": q * self.attention.dim**-0.5, "k": k, "v": v, "g": g}
        return inputs if self.bonus is None else inputs | {"bonus": self.bonus}


def token_shift(
    x: Float[Tensor, "batch time hidden"],
    mixing: MixerContext,
    past: Float[Tensor, "batch hidden"] | None,
) -> tuple[Float[Tensor, "batch time hidden"], Float[Tensor, "batch hidden"]]:
    """(every token's predecessor in its document, the last token).

    The first token of a document has zeros for a predecessor. Padding is skipped.

    Args:
        x: tokens.
        mixing: padding and documents of these tokens.
        past: the token before the first; None: zeros.
    """
    past = torch.zeros_like(x[:, 0]) if past is None else past
    joined = torch.cat((past.unsqueeze(1), x), 1)

    # Every place takes the latest token that is no padding; place 0 is `past`.
    if mixing.valid is not None:
        at = torch.arange(1, joined.shape[1], device=x.device) * mixing.valid
        at = torch.nn.functional.pad(at, (1, 0)).cummax(1).values
        joined = joined.gather(1, at.unsqueeze(-1).expand_as(joined))

    before = joined[:, :-1]
    if mixing.segments is not None:
        same = mixing.segments[:, 1:] == mixing.segments[:, :-1]
        before = before * torch.nn.functional.pad(same, (1, 0), value=True).unsqueeze(-1)
    return before, joined[:, -1]
