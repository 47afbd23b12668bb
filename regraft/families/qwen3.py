"""Qwen3 (arXiv 2505.09388): Llama plus an RMS norm on each head's queries and keys."""

from ..core.anatomy import Anatomy, norm
from .llama import DEFAULTS, LAYER, SIZES, kv_heads, parts

anatomy = Anatomy(
    family="qwen3",
    parts={
        **parts("attention_bias", "attention_bias", mlp_bias=False),
        **norm("attn.q_norm", f"{LAYER}.self_attn.q_norm", "dim"),
        **norm("attn.k_norm", f"{LAYER}.self_attn.k_norm", "dim"),
    },
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "head_dim": 128,
        "num_key_value_heads": kv_heads(32),
    },
)
