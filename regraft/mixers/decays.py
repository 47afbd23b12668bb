"""Decays that are the same at every token, one per head: fixed as published, or learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.shapes import Float
from .attention import Attention, alibi_slopes
from .linear import LinearAttention
from .weight_spec import WeightSpec

HALF_LIVES = (0.7, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 250.0, 1000.0)  # tokens


def log_decays(kind: str, heads: int) -> Float[Tensor, " heads"]:
    """Fixed log-decay of each head.

    Args:
        kind: `lightning`: minus ALiBi's slope; `retnet`: log(1 - 2^(-5-h)) for head h (arXiv
            2307.08621); `none`: zero.
        heads: number of heads.
    """
    if kind == "none":
        return torch.zeros(heads)
    if kind == "lightning":
        return -torch.tensor(alibi_slopes(heads))
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))))


def fixed_log_decays(
    kind: str, k: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time"]:
    """The log-decays of `log_decays` at every token of the keys `k`."""
    return spread_decays(log_decays(kind, k.shape[1]), k)


def source_log_decays(
    attention: Attention, k: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time"]:
    """Log-decays that are the source's ALiBi, at every token of the keys `k`; zeros without it.

    e^(q k - slope distance) is e^(q k) times a decay of e^(-slope) at each token.
    """
    slopes = attention.slopes
    return spread_decays(-torch.tensor(slopes) if slopes else log_decays("none", k.shape[1]), k)


def start_decays(attention: Attention, form: str, usual: str) -> str:
    """Initial value of a gate that gives a decay per head, as of `initialize`.

    Args:
        attention: that is replaced; its ALiBi is the start where it has one.
        form: of `alibi_...`, what the gate is behind.
        usual: the start without ALiBi.
    """
    if attention.alibi is None or attention.group > 1:
        return usual
    return f"alibi_{form} {attention.heads} {attention.alibi:g}"


def spread_decays(
    decays: Float[Tensor, " heads"], k: Float[Tensor, "batch heads time dim"]
) -> Float[Tensor, "batch heads time"]:
    """A log-decay of each head at every token of the keys `k`."""
    return decays.to(k.device).view(1, -1, 1).expand(k.shape[:3])


class HeadDecayAttention(LinearAttention):
    """Linear attention with one decay per head.

    Its options have `decays`: a kind of `log_decays`, or `learned`: the slopes of `lightning` times
    e^rate. Where the source has ALiBi, these slopes are its own. Calibration starts learned decays
    at the half-lives that fit the teacher best.
    """

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        if self.options.decays == "learned":
            self.rate = nn.Parameter(torch.zeros(self.states))

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections; learned decays begin as `lightning` has them."""
        options, table = cls.parse(spec), super().weights(attention, spec, output)
        if options.decays == "learned":
            table["rate"] = WeightSpec(f"-> {cls.state_axes(options)}", fresh="zeros", decay=False)
        return table

    @property
    def half_lives(self) -> Float[Tensor, "candidates states"] | None:
        """`HALF_LIVES` for learned decays; None for fixed ones."""
        if self.options.decays != "learned":
            return None
        return torch.tensor(HALF_LIVES).unsqueeze(1).expand(-1, self.states).to(self.rate.device)

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " states"]) -> None:
        """Set each state's decay so that it has lost half after `tokens`."""
        usual = -self.slope_decays().to(tokens.device)
        self.rate.copy_((math.log(2) / tokens / usual).log())

    def decays(
        self, k: Float[Tensor, "batch states time dim"]
    ) -> Float[Tensor, "batch states time"]:
        """Log-decay at every token of the keys `k`."""
        if self.options.decays not in ("learned", "lightning"):
            return fixed_log_decays(self.options.decays, k)
        decays = spread_decays(self.slope_decays(), k)
        if self.options.decays == "lightning":
            return decays
        return decays * self.rate.float().exp().view(1, -1, 1)

    def slope_decays(self) -> Float[Tensor, " states"]:
        """Minus the slopes of ALiBi: the source's, or those of `lightning`."""
        slopes = self.attention.slopes
        return -torch.tensor(slopes) if slopes else log_decays("lightning", self.states)
