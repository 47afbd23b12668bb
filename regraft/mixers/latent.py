"""Queries, keys and values of multi-head latent attention (MLA), as DeepSeek has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention, HeadNorm
from .weight_spec import WeightSpec


class LatentProjections(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eqs. 37-46).

    Keys and values are made of a latent, which is normed: c_t = norm(W_DKV x_t), and per head
    k_t = [W_KR x_t, W_UK c_t], v_t = W_UV c_t. The first part of the keys is the same for all heads
    and alone is rotated. Queries have the same two parts, and may be made of a latent as well.

    Deviation: the rotated coordinates of a head stand first, where `apply_rotary` looks for them,
    and not last. Scores are the same.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        hidden, heads, eps = attention.hidden, attention.heads, attention.latent_eps
        self.attention, bias = attention, attention.qkv_bias
        if attention.query_latent:
            self.q_a_proj = nn.Linear(hidden, attention.query_latent, bias=bias)
            self.q_a_norm = HeadNorm(attention.query_latent, eps)
            self.q_b_proj = nn.Linear(attention.query_latent, heads * attention.dim, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, heads * attention.dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden, attention.latent + attention.rope, bias=bias)
        self.kv_a_norm = HeadNorm(attention.latent, eps)
        self.kv_b_proj = nn.Linear(attention.latent, heads * expanded_width(attention), bias=False)

    def forward(
        self, x: Float[Tensor, "batch time hidden"]
    ) -> tuple[
        Float[Tensor, "batch heads time dim"],
        Float[Tensor, "batch heads time dim"],
        Float[Tensor, "batch heads time value"],
    ]:
        """Queries, keys and values, not yet rotated."""
        attention = self.attention
        nope = attention.dim - attention.rope
        if attention.query_latent:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        q = q.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        q = torch.cat((q[..., nope:], q[..., :nope]), -1)

        latent, shared = self.kv_a_proj(x).split((attention.latent, attention.rope), -1)
        own = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (attention.heads, -1))
        k, v = own.transpose(1, 2).split((nope, attention.value), -1)
        shared = shared.unsqueeze(1).expand(-1, attention.heads, -1, -1)
        return q, torch.cat((shared, k), -1), v

    def value_rows(self) -> Float[Tensor, "heads value latent"]:
        """The rows of `kv_b_proj` that make values, a view."""
        rows = self.kv_b_proj.weight.unflatten(0, (self.attention.heads, -1))
        return rows[:, -self.attention.value :]


def expanded_width(attention: Attention) -> int:
    """What each head makes of the latent: the keys that are not shared, and values."""
    return attention.dim - attention.rope + attention.value


def latent_weights(attention: Attention) -> dict[str, WeightSpec]:
    """Local parameter name -> WeightSpec of `LatentProjections`; widths that no axis has stand in
    the signatures as numbers.
    """
    joined = attention.latent + attention.rope
    maps = {
        "kv_a": f"hidden -> {joined}",
        "kv_b": f"latent -> {attention.heads * expanded_width(attention)}",
    }
    norms = {"kv_a": "gain latent"}
    if attention.query_latent:
        maps |= {"q_a": "hidden -> query_latent", "q_b": "query_latent -> kv group dim"}
        norms["q_a"] = "gain query_latent"
    else:
        maps["q"] = "hidden -> kv group dim"

    table = {
        f"{name}_proj.weight": WeightSpec(axes, f"attn.{name}.weight")
        for name, axes in maps.items()
    }
    for name, axes in norms.items():
        source = f"attn.{name}_norm.weight"
        table[f"{name}_norm.weight"] = WeightSpec(axes, source, decay=False)
    if attention.qkv_bias:
        for name in norms:
            width = maps[name].partition(" -> ")[2]
            # Tables write a bias of a number of coordinates as a tensor of that size.
            axes = width if width.isdigit() else f"-> {width}"
            table[f"{name}_proj.bias"] = WeightSpec(axes, f"attn.{name}.bias", decay=False)
    return {f"latent.{name}": weight for name, weight in table.items()}


def refuse_latent(attention: Attention, mixer: str, why: str) -> None:
    """RegraftError for a mixer that cannot take keys and values from a latent.

    Args:
        attention: what it would replace.
        mixer: its name, and the option that asks for what cannot be.
        why: the reason, and what to give in its place.
    """
    if attention.latent:
        raise RegraftError(
            f"mixer {mixer} cannot replace latent attention, whose keys and values are made of one"
            f" latent of {attention.latent}: {why}"
        )
