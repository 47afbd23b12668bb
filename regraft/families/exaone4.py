"""EXAONE 4.0 (LG, arXiv 2507.11407): OLMo 2's norms around branches, and one on each head's queries
and keys.

Of layers with and without a window those without have no positions.
"""

from dataclasses import replace

from ..core.anatomy import Config, norm
from . import olmo2
from .llama import LAYER

ATTENTION = f"{LAYER}.self_attn"


def rotates(config: Config, layer: int) -> bool:
    """Whether a layer has rotary positions."""
    if config.get("sliding_window", 4096) is None:
        return True
    if config.get("layer_types"):
        return bool(config["layer_types"][layer] == "sliding_attention")
    return (layer + 1) % (config.get("sliding_window_pattern") or 4) != 0


anatomy = replace(
    olmo2.anatomy,
    family="exaone4",
    parts={
        **{role: part for role, part in olmo2.anatomy.parts.items() if part.when is None},
        **norm("attn.q_norm", f"{ATTENTION}.q_norm", "dim"),
        **norm("attn.k_norm", f"{ATTENTION}.k_norm", "dim"),
    },
    rotates=rotates,
)
