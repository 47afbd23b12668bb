"""Code World Model (Meta, 2025): Llama with a sliding window in three of four layers."""

from .llama import kv_heads, parts, variant

anatomy = variant(
    "cwm",
    {"num_key_value_heads": kv_heads(8), "head_dim": 128, "rms_norm_eps": 1e-5},
    parts=parts(False, False, False),
    divides=(("hidden_size", "num_attention_heads"),),
)
