"""GraniteSWA (IBM, 2026): Llama with full and sliding layers, a learned sink per head in every
softmax, and factors on embeddings, branches, scores and logits.
"""

from __future__ import annotations

from ..core.anatomy import Anatomy, Config, Part
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama_parts

FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def sinks() -> dict[str, Part]:
    """The logit of each head's sink."""
    return {"attn.sinks.weight": Part(f"{LAYER}.self_attn.sinks", "-> kv group")}


def parts() -> dict[str, Part]:
    """Llama's parts and the sinks."""
    return {**llama_parts("attention_bias", "attention_bias", "mlp_bias"), **sinks()}


def softmax_scale(config: Config, dim: int, layer: int) -> float:
    """Set by a config key, independent of the head dim."""
    return float(config["attention_multiplier"])


anatomy = Anatomy(
    family="granite_swa",
    parts=parts(),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": kv_heads(4),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "attention_multiplier": 1.0,
    },
    scale=softmax_scale,
    factors=FACTORS,
    not_null=("head_dim",),
)
