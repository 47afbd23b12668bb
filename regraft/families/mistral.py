"""Mistral (arXiv 2310.06825): Llama without biases."""

from typing import Any

from ..core.anatomy import Anatomy, Config
from .llama import DEFAULTS, IGNORED, LAYER, SIZES, kv_heads, parts


def rewrite_as_ministral(config: Config) -> dict[str, Any]:
    """Auto reads a config with kinds of layers as Ministral's, the class that has them."""
    if "layer_types" not in config:
        return {}
    names = config.get("architectures") or []
    architectures = [name.replace("Mistral", "Ministral") for name in names]
    return {"model_type": "ministral"} | ({"architectures": architectures} if names else {})


anatomy = Anatomy(
    family="mistral",
    parts=parts(qkv_bias=False, o_bias=False, mlp_bias=False),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**DEFAULTS, "num_key_value_heads": kv_heads(8)},
    ignored=IGNORED,
    rewrite=rewrite_as_ministral,
)
