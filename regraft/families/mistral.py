"""Mistral (arXiv 2310.06825): Llama without biases."""

from typing import Any

from ..core.anatomy import Anatomy, Config
from .llama import DEFAULTS, LAYER, SIZES, kv_heads, parts


def state_head_dim(config: Config) -> dict[str, Any]:
    """Ministral's class has no size of heads of its own: one that is missing or null is stated."""
    sizes = [config.get(key) for key in ("hidden_size", "num_attention_heads")]
    if config.get("head_dim") is not None or not all(type(size) is int and size for size in sizes):
        return {}
    return {"head_dim": DEFAULTS["head_dim"](config)}


def rewrite_as_ministral(config: Config) -> dict[str, Any]:
    """Auto reads a config with kinds of layers as one of Ministral, the class that has them."""
    if "layer_types" not in config:
        return {}
    names = config.get("architectures") or []
    architectures = [str(name).replace("Mistral", "Ministral") for name in names]
    keys = {"model_type": "ministral"} | ({"architectures": architectures} if names else {})
    return keys | state_head_dim(config)


anatomy = Anatomy(
    family="mistral",
    parts=parts(qkv_bias=False, o_bias=False, mlp_bias=False),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**DEFAULTS, "num_key_value_heads": kv_heads(8)},
    rewrite=rewrite_as_ministral,
)
