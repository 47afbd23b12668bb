"""Gemma 2 (arXiv 2408.00118): Gemma with a second norm at the end of each branch.

Every second layer attends to a sliding window only.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from . import gemma
from .llama import LAYER, SIZES


def parts() -> dict[str, Part]:
    """Gemma's parts with norms before and after both branches."""
    after: dict[str, Any] = {"unit": True, "reads": "branch", "writes": "stream"}
    # A branch ends in a norm, so its last map writes "branch" and the norm writes the stream.
    o, down = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"
    return {
        **gemma.parts(),
        **linear("attn.o", o, "kv group dim -> hidden", bias="attention_bias", writes="branch"),
        **norm("norm.attn_post", f"{LAYER}.post_attention_layernorm", **after),
        **norm("norm.mlp", f"{LAYER}.pre_feedforward_layernorm", unit=True),
        **linear("mlp.down", down, "ffn -> hidden", writes="branch"),
        **norm("norm.mlp_post", f"{LAYER}.post_feedforward_layernorm", **after),
    }


def softmax_scale(config: Config, dim: int, layer: int) -> float:
    """Set by a config key, independent of the head dim."""
    return float(config["query_pre_attn_scalar"]) ** -0.5


anatomy = Anatomy(
    family="gemma2",
    parts=parts(),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        **gemma.TIED,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
    },
    embed_scale=True,
    scale=softmax_scale,
    softcap=("attn_logit_softcapping", 50.0),
    divides=(("hidden_size", "num_attention_heads"),),
    activation="hidden_activation",
)
