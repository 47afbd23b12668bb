"""RetNet's multi-scale retention on the source's projections, as in XATL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.shapes import Float
from .base import MixerContext
from .decays import fixed_log_decays
from .linear import LinearAttention, LinearOptions


@dataclass(frozen=True)
class RetnetOptions(LinearOptions):
    """As `LinearOptions`, with XATL's defaults."""

    # rms (XATL's released code) or layer (the paper's group norm), both without gain.
    norm: Literal["none", "rms", "layer"] = "rms"
    gate: Literal["none", "silu", "sigmoid"] = "silu"


class Retnet(LinearAttention):
    """Retention (Sun et al., arXiv 2307.08621, eqs. 6-8) as in XATL (arXiv 2404.02684).

    S_t = gamma_h S_{t-1} + k_t v_t^T with gamma_h = 1 - 2^(-5-h), o_t = S_t^T q_t / sqrt(dim), and
    the layer gives W_O (silu(W_G x_t) * norm(o_t)). W_G is new. The source's rotary embedding takes
    the place of xPos.
    """

    name = "retnet"
    Options = RetnetOptions
    takes_alibi = False

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Scaled queries, keys, values, the heads' decays."""
        q, k, v = self.qkv(x)
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        g = fixed_log_decays("retnet", k)
        return {"q": q * self.attention.dim**-0.5, "k": k, "v": v, "g": g}
