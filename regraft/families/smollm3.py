"""SmolLM3 (Hugging Face, 2025): Llama without positions in every fourth layer (NoPE)."""

from ..core.anatomy import Config
from .llama import kv_heads, variant


def rotates(config: Config, layer: int) -> bool:
    """Whether a layer has rotary positions."""
    listed = config.get("no_rope_layers")  # despite its name, 1 where there are positions
    if listed is not None:
        return bool(listed[layer])
    return (layer + 1) % config["no_rope_layer_interval"] != 0


anatomy = variant(
    "smollm3",
    {
        "num_key_value_heads": kv_heads(4),
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    rotates=rotates,
)
