"""Seed-OSS (ByteDance, 2025): Qwen2 with a switch for each kind of bias."""

from .llama import kv_heads, parts, variant

anatomy = variant(
    "seed_oss",
    {
        "num_key_value_heads": kv_heads(8),
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    parts=parts("attention_bias", "attention_out_bias", "mlp_bias"),
)
