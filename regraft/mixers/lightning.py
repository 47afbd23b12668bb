"""Lightning attention: linear attention with a fixed decay per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.shapes import Float
from .base import MixerContext
from .decays import HeadDecayAttention
from .linear import ACTIVATIONS, LinearOptions


@dataclass(frozen=True)
class LightningOptions(LinearOptions):
    """As `LinearOptions`, and activation and decays.

    HypeNet's form is {"gate": "sigmoid"}. Without rotary and norm the layer is the plain
    fixed-decay recurrence, whose outputs are as large as the source's queries and keys make them.
    """

    norm: Literal["none", "rms", "layer"] = "rms"
    # Of queries and keys.
    activation: Literal["none", "silu"] = "none"
    # `lightning` is ALiBi's slopes; the others as in `decays.log_decays` and `HeadDecayAttention`.
    decays: Literal["lightning", "retnet", "learned", "none"] = "lightning"


class Lightning(HeadDecayAttention):
    """Lightning attention (Qin et al., arXiv 2401.04658, eq. 3).

    S_t = e^(-s_h) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, then an RMS norm with gain. s_h are ALiBi's
    slopes, queries are scaled by 1/sqrt(dim). HypeNet (arXiv 2601.22156) puts it into pretrained
    models with the source's rotary embedding, QK norm and a sigmoid output gate.
    """

    name = "lightning"
    Options = LightningOptions
    gain = "dim"

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Scaled queries, keys, values, the heads' decays."""
        q, k, v = self.qkv(x)
        q, k = (ACTIVATIONS[self.options.activation](t) for t in (q, k))
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        return {"q": q * self.attention.dim**-0.5, "k": k, "v": v, "g": self.decays(k)}
