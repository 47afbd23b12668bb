"""ERNIE 4.5 (Baidu, 2025): Llama with one switch for all biases.

Neighbouring coordinates of a head turn together.
"""

from .llama import kv_heads, parts, variant

anatomy = variant(
    "ernie4_5",
    {
        "num_key_value_heads": kv_heads(2),
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    parts=parts("use_bias", "use_bias", "use_bias"),
    rotary_pairs=True,
)
