"""Gemma (arXiv 2403.08295): Llama with two changes.

Gains of norms are stored minus one, and embeddings are multiplied by sqrt(hidden).
"""

from typing import Any

from ..core.anatomy import Anatomy, Part, norm
from .llama import DEFAULTS, LAYER, SIZES
from .llama import parts as llama

# Defaults that Gemma 2 and 3 share.
TIED: dict[str, Any] = {
    **DEFAULTS,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


def parts() -> dict[str, Part]:
    """Llama's parts with gains stored minus one."""
    return {
        **llama("attention_bias", "attention_bias", mlp_bias=False),
        **norm("norm.attn", f"{LAYER}.input_layernorm", unit=True),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", unit=True),
        **norm("norm.final", "model.norm", unit=True, writes="head"),
    }


anatomy = Anatomy(
    family="gemma",
    parts=parts(),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**TIED, "num_key_value_heads": 16},
    embed_scale=True,
)
