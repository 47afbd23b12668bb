"""Helium (Kyutai, 2025): Llama whose neighbouring coordinates turn together.

The class has hidden = heads * head_dim.
"""

from .llama import SIZES, kv_heads, variant

COUPLED = ("hidden_size", "kv group dim")

anatomy = variant(
    "helium",
    {"num_key_value_heads": kv_heads(20), "head_dim": 128, "rms_norm_eps": 1e-8},
    sizes=(*SIZES, COUPLED),
    rotary_pairs=True,
)
