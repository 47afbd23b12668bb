"""Qwen2 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from ..core.anatomy import Anatomy
from .llama import DEFAULTS, LAYER, SIZES, kv_heads, parts

anatomy = Anatomy(
    family="qwen2",
    parts=parts(qkv_bias=True, o_bias=False, mlp_bias=False),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**DEFAULTS, "num_key_value_heads": kv_heads(32)},
)
