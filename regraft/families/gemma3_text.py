"""Gemma 3's text model (arXiv 2503.19786): Gemma 2 plus a norm on queries and keys of each head."""

from dataclasses import replace
from typing import Any

from ..core.anatomy import norm, older_rope_keys
from . import gemma2
from .llama import LAYER


def periodic_layer_types(config: Any) -> list[str]:
    """Windows on all layers but every sixth (or whatever an old config says)."""
    period = config.get("sliding_window_pattern", 6)
    return [
        "sliding_attention" if (i + 1) % period else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


def older_config_keys(config: Any) -> dict[str, Any]:
    """Rotary parameters of both kinds of layers in the keys from before they were nested."""
    rope = config.get("rope_parameters") or {}
    both = [rope.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
    keys = older_rope_keys({"rope_parameters": both[0]})
    if "rope_theta" in both[1]:
        keys["rope_local_base_freq"] = both[1]["rope_theta"]
    return keys


anatomy = replace(
    gemma2.anatomy,
    family="gemma3_text",
    parts={
        **gemma2.parts(),
        **norm("attn.q_norm", f"{LAYER}.self_attn.q_norm", "dim", unit=True),
        **norm("attn.k_norm", f"{LAYER}.self_attn.k_norm", "dim", unit=True),
    },
    defaults={**gemma2.anatomy.defaults, "layer_types": periodic_layer_types},
    older=older_config_keys,
)
