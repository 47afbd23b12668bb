"""Ministral 3 (Mistral AI, 2025): Mistral whose queries grow with their position, slowly."""

from .llama import kv_heads, parts, variant

anatomy = variant(
    "ministral3",
    {"num_key_value_heads": kv_heads(8), "head_dim": 128, "rms_norm_eps": 1e-5},
    parts=parts(False, False, False),
)
