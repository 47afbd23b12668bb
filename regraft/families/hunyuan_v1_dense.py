"""Hunyuan dense (Tencent, 2025): Llama with norms on queries and keys after they are rotated."""

from ..core.anatomy import norm
from .llama import LAYER, parts, variant

ATTENTION = f"{LAYER}.self_attn"

anatomy = variant(
    "hunyuan_v1_dense",
    {"rms_norm_eps": 1e-5},
    parts={
        **parts("attention_bias", "attention_bias", False),
        **norm("attn.q_norm", f"{ATTENTION}.query_layernorm", "dim"),
        **norm("attn.k_norm", f"{ATTENTION}.key_layernorm", "dim"),
    },
    norms_rotated=True,
)
