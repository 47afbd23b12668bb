"""SigLIP's tower for images (arXiv 2303.15343): a ViT without a class token.

A query of its own attends to all patches and gives the image's vector. This head has the hidden
size, so that layers and MLPs grow and the hidden size does only without it.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from . import vit
from .clip_vision_model import DEFAULTS, SIZES, layer_parts

LAYER = "encoder.layers.{}"
OWN: dict[str, Any] = {"writes": "own", "when": "vision_use_head"}


def check_pooling(config: Config) -> dict[str, Any]:
    """RegraftError where the head would have to grow with the hidden size or its heads."""
    sizes = config.get("_before", {})
    keys = {"hidden": "hidden_size", "kv": "num_attention_heads"}
    moved = [key for axis, key in keys.items() if sizes.get(axis, config[key]) != config[key]]
    if moved and config["vision_use_head"]:
        raise RegraftError(
            f"siglip_vision_model has a head that attends to its patches, which does not grow with"
            f" {moved[0]} ({config[moved[0]]}): use --layers and --ffn, or a model with"
            " vision_use_head false"
        )
    return {}


def count_positions(config: Config) -> int:
    """Number of patches."""
    return vit.position_count(config) - 1


def head_parts() -> dict[str, Part]:
    """The query, its attention and its MLP."""
    name, attention = "head", "head.attention"
    kept: dict[str, Any] = {"reads": "own", "bias": True, **OWN}
    return {
        "pool.probe.weight": Part(f"{name}.probe", "one one hidden", **OWN),
        "pool.in.weight": Part(
            f"{attention}.in_proj_weight", "hidden -> three hidden", reads="normed", **OWN
        ),
        "pool.in.bias": Part(f"{attention}.in_proj_bias", "-> three hidden", **OWN),
        **linear("pool.out", f"{attention}.out_proj", "hidden -> hidden", **kept),
        **norm("norm.pool", f"{name}.layernorm", **kept),
        **linear("pool.up", f"{name}.mlp.fc1", "hidden -> ffn", **kept),
        **linear("pool.down", f"{name}.mlp.fc2", "ffn -> hidden", **kept),
    }


anatomy = Anatomy(
    family="siglip_vision_model",
    parts={
        "embed.weight": Part(
            "embeddings.patch_embedding.weight", "hidden channel patch patch", at="patch"
        ),
        "embed.bias": Part("embeddings.patch_embedding.bias", "-> hidden"),
        **linear("pos", "embeddings.position_embedding", "pos -> hidden", stored="in out"),
        **layer_parts(LAYER),
        **norm("norm.final", "post_layernorm", bias=True),
        **head_parts(),
    },
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        "patch_size": 16,
        **DEFAULTS,
        "vision_use_head": True,
        "layer_norm_eps": 1e-6,
        "_positions": count_positions,
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    finish=check_pooling,
    causal=False,
    inputs="pixels",
)
