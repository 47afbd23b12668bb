"""granite_swa: GraniteSWA, in llama.cpp since build b10514."""

from __future__ import annotations

from typing import Any

from ..architecture import GGUFArchitecture


def find_keys(stock: Any) -> dict[str, Any]:
    """Factors, and which layers rotate."""
    return {
        "attention.scale": float(stock.attention_multiplier),
        "embedding_scale": float(stock.embedding_multiplier),
        "residual_scale": float(stock.residual_multiplier),
        "logit_scale": float(stock.logits_scaling),
        "attention.rope_pattern": [bool(theta) for theta in stock.layer_rope_theta],
        "rope.freq_base": float(max(stock.layer_rope_theta) or stock.rope_parameters["rope_theta"]),
    }


def find_misfits(stock: Any) -> list[str]:
    """Rotary positions of several bases."""
    bases = sorted({theta for theta in stock.layer_rope_theta if theta})
    if len(bases) < 2:
        return []
    return [f"layer_rope_theta has {', '.join(f'{base:g}' for base in bases)}, llama.cpp takes one"]


architecture = GGUFArchitecture(
    name="granite_swa",
    families=("granite_swa",),
    names="GRANITE",
    biases="attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down",
    reads=(
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "attention_multiplier",
        "layer_rope_theta",
    ),
    ropes=("default", "linear", "yarn", "llama3"),
    interleaved=True,
    windows=True,
    renamed={"attn.sinks.weight": "blk.{}.attn_sinks.weight"},
    scale=lambda stock: float(stock.attention_multiplier),
    keys=find_keys,
    find_misfits=find_misfits,
)
