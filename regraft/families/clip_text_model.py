"""CLIP's tower for texts (arXiv 2103.00020): a causal transformer, read at the end of the text."""

from typing import Any

from ..core.anatomy import Anatomy, Part, linear, norm
from . import bert
from .bert import head_defaults
from .clip_vision_model import layer_parts, tower_prefix

HEADS = {"CLIPTextModel": "", "CLIPTextModelWithProjection": "projection"}
LAYER = "{p}encoder.layers.{}"
SIZES = tuple(pair for pair in bert.SIZES if pair[1] not in ("type", "label"))


def text_parts() -> dict[str, Part]:
    """Tokens, positions and layers, as SigLIP has them too."""
    name = "{p}embeddings"
    table: dict[str, Any] = {"stored": "in out"}
    return {
        **linear("embed", f"{name}.token_embedding", "vocab -> hidden", **table),
        **linear("pos", f"{name}.position_embedding", "pos -> hidden", **table),
        **layer_parts(LAYER),
        **norm("norm.final", "{p}final_layer_norm", bias=True),
    }


anatomy = Anatomy(
    family="clip_text_model",
    parts={
        **text_parts(),
        "projection.weight": Part(
            "text_projection.weight", "hidden -> pool", reads="normed", writes="own", at="last",
            when="_projection",
        ),
    },
    sizes=(*SIZES, ("projection_dim", "pool")),
    slot=f"{LAYER}.self_attn",
    defaults={
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "layer_norm_eps": 1e-5,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    prefix=tower_prefix(HEADS, "text_model."),
    causal=False,
)  # fmt: skip
