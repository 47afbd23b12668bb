"""InternLM3 (Shanghai AI Laboratory, 2025): Llama with one switch for all biases."""

from ..core.anatomy_defaults import read_aliases
from .llama import kv_heads, variant

anatomy = variant(
    "internlm3",
    {"num_key_value_heads": kv_heads(2), "head_dim": 128, "rms_norm_eps": 1e-5},
    rewrite=read_aliases({"qkv_bias": "attention_bias", "bias": "mlp_bias"}),
    divides=(("hidden_size", "num_attention_heads"),),
)
