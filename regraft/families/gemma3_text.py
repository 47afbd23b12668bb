"""The text model of Gemma 3 (arXiv 2503.19786): Gemma 2 with query and key norms."""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Config, norm, older_rope_keys
from . import gemma2
from .llama import LAYER


def older_config_keys(config: Config) -> dict[str, Any]:
    """Rotary parameters of both kinds of layers under the keys used before they were nested."""
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
    softcap=("attn_logit_softcapping", None),
    older=older_config_keys,
)
