"""The softmax attention that a mixer replaces: sizes, rotation, norms on queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float, Int
from ..errors import RegraftError

# The norms on queries that mixers compute, as signatures.
QK_NORM_FORMS = ("gain dim", "1+gain dim", "gain kv group dim")


@dataclass(frozen=True)
class Attention:
    """Sizes and conventions of the softmax attention that a mixer replaces.

    There are `kv * group` query heads; query head `h` reads key/value head `h // group`.
    """

    hidden: int  # width of the residual stream
    kv: int  # key/value heads
    group: int  # query heads per key/value head
    dim: int  # width of a head
    scale: float  # multiplies the logits, usually dim ** -0.5
    qkv_bias: bool = False  # whether the projections of queries, keys and values have biases
    o_bias: bool = False  # whether the output projection has a bias
    qk_norm: float | None = None  # epsilon of an RMS norm per head on queries and keys, or no norm
    rotary: bool = True  # whether the source rotates queries and keys
    softcap: float | None = None  # c in c tanh(logits / c) before the softmax; None: no cap
    rotary_pairs: bool = (
        False  # whether coordinates 2i and 2i + 1 turn together, not i and i + half
    )
    rotary_tables: str = "halves"  # the layout of cos and sin, see `Anatomy.rotary_tables`
    # What the norm normalizes: "gain dim", "1+gain dim", or all heads together.
    qk_norm_form: str = "gain dim"
    qk_norm_centered: bool = False  # whether it subtracts the mean of a head
    qk_norm_bias: bool = False  # whether it adds a bias
    norms_rotated: bool = False  # whether the norm comes after the rotation, not before
    gated: bool = False  # whether a sigmoid of the layer's input multiplies heads' outputs
    sinks: bool = False  # whether every head has a learned logit beside its scores
    # Latent attention (see `latent.LatentProjections`); zeros in any other.
    latent: int = 0  # width of what keys and values are made of
    query_latent: int = 0  # width of what queries are made of; 0: of the layer's input
    rope: int = 0  # coordinates of a head whose keys all heads share, the only ones that turn
    value: int = 0  # width of a head's values
    latent_eps: float = 1e-6  # epsilon of the norms of the latents
    # Scores fall by distance times each head's slope of ALiBi, the least of which is 2 to the minus
    # this; None: they do not.
    alibi: float | None = None
    clip: float | None = None  # limit of queries, keys and values on both sides; None: no limit

    def __post_init__(self) -> None:
        if self.qk_norm_form not in QK_NORM_FORMS:
            raise RegraftError(
                f"attention with qk_norm_form '{self.qk_norm_form}': mixers know"
                f" {', '.join(QK_NORM_FORMS)}"
            )

    @property
    def norms_heads_together(self) -> bool:
        """Whether one norm runs over all heads of the queries, and one over those of the keys."""
        return "kv" in self.qk_norm_form

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.value or self.dim

    @property
    def value_axis(self) -> str:
        """The same as a named axis."""
        return "value" if self.value else "dim"

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv * self.group

    @property
    def slopes(self) -> list[float] | None:
        """The slope of ALiBi of each query head; None where scores do not fall with distance."""
        return None if self.alibi is None else alibi_slopes(self.heads, self.alibi)

    def scale_scores(
        self,
        scores: Float[Tensor, "batch kv ... queries keys"],
        distance: Int[Tensor, "#batch #kv ... #queries keys"] | None,
    ) -> Float[Tensor, "batch kv ... queries keys"]:
        """The logits of the softmax: scaled, then capped; with ALiBi they fall with distance.

        Args:
            scores: products of queries and keys; `queries` are by head, then by token.
            distance: from each query back to each key, in tokens; only read with ALiBi.
        """
        scores = scores * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        slopes = self.slopes
        if slopes is None:
            return scores
        assert distance is not None
        spread = spread_heads(torch.tensor(slopes, device=scores.device), scores)
        return scores - (spread * distance).to(scores.dtype)


def alibi_slopes(heads: int, exponent: float = 8.0) -> list[float]:
    """ALiBi's geometric slopes for any number of heads (arXiv 2108.12409).

    Beyond a power of two, every other slope of the next power is added, as in the released code.

    Args:
        heads: number of heads.
        exponent: the last slope is 2 to the minus this; 8 in the paper.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-exponent * (i + 1) / power) for i in range(power)]
    if power == heads:
        return first
    return first + alibi_slopes(2 * power, exponent)[::2][: heads - power]


def spread_heads(
    numbers: Float[Tensor, " heads"], scores: Float[Tensor, "batch kv ... queries keys"]
) -> Float[Tensor, "kv ... queries 1"]:
    """A number of each head beside its scores; `queries` are by head, then by token."""
    kv, rows = scores.shape[1], scores.shape[-2]
    tokens = rows * kv // len(numbers)  # of each head
    spread = numbers.float().view(kv, -1).repeat_interleave(tokens, 1)
    return spread.view(kv, *[1] * (scores.ndim - 4), rows, 1)


def apply_rotary(
    x: Float[Tensor, "batch heads time dim"],
    rotary: tuple[Float[Tensor, "rows time rotary"], Float[Tensor, "rows time rotary"]] | None,
    pairs: bool = False,
) -> Float[Tensor, "batch heads time dim"]:
    """Rotary embedding (Su et al., arXiv 2104.09864), in the half-split layout or in pairs.

    Only the first `rotary` dimensions are rotated, the others pass unchanged (partial rotary).

    Args:
        x: queries or keys.
        rotary: cos and sin, with one row for all or one per row of the batch; None: x is returned.
        pairs: whether coordinates 2i and 2i + 1 turn together, not i and i + half of the width.
    """
    if rotary is None:
        return x

    cos, sin = (table.unsqueeze(1) for table in rotary)
    width = cos.shape[-1]
    rotated, passed = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if pairs:
        # Each pair has its angle once in the first half of the tables.
        cos, sin = (
            table.repeat_interleave(2, -1)
            for table in (cos[..., : width // 2], sin[..., : width // 2])
        )
        turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos + turned * sin
    if passed is None:
        return rotated.to(x.dtype)
    return torch.cat((rotated, passed), dim=-1).to(x.dtype)


def split_complex(tables: Any) -> Any:
    """Tables of cos and sin; those of classes that hold them as one complex tensor, which have
    every pair once (DeepSeek-V2), as two.
    """
    if isinstance(tables, Tensor) and tables.is_complex():
        return tables.real, tables.imag
    return tables


class HeadNorm(nn.Module):
    """RMS norm with a gain, computed in float32: over each head, or over all of them together. A
    layer norm over each head where the source has one.

    Args:
        dim: width of a head.
        eps: added to the mean square.
        heads: number of heads that are normed together; 1: each by itself.
        unit: whether the gain is stored minus one.
        centered: whether the mean is subtracted first.
        bias: whether a bias is added behind the gain.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        eps: float,
        heads: int = 1,
        unit: bool = False,
        centered: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads * dim,), 0.0 if unit else 1.0))
        self.register_parameter("bias", nn.Parameter(torch.zeros(heads * dim)) if bias else None)
        self.eps, self.heads, self.unit, self.centered = eps, heads, unit, centered

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalise queries or keys, (batch, heads, time, dim), or what they are made of."""
        wide = x.float()
        if self.centered or self.bias is not None:
            shape, bias = self.weight.shape, None if self.bias is None else self.bias.float()
            return F.layer_norm(wide, shape, self.weight.float(), bias, self.eps).to(x.dtype)
        axes = (-1,) if self.heads == 1 else (-3, -1)
        wide = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + self.eps)
        if self.unit:
            return ((1.0 + self.weight.float()) * wide).to(x.dtype)
        gain = self.weight if self.heads == 1 else self.weight.view(self.heads, 1, -1)
        return gain * wide.to(x.dtype)
