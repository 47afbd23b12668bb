"""Command R7B and Command A (Cohere, arXiv 2504.00698): Command R with windows in most layers.

Layers that see all tokens have no positions.
"""

from dataclasses import replace

from ..core.anatomy import Config
from . import cohere


def rotates(config: Config, layer: int) -> bool:
    """Whether a layer has rotary positions: those with a window do."""
    if config.get("layer_types"):
        return bool(config["layer_types"][layer] == "sliding_attention")
    return (layer + 1) % (config.get("sliding_window_pattern") or 4) != 0


anatomy = replace(cohere.anatomy, family="cohere2", parts=cohere.parts(), rotates=rotates)
