"""SigLIP's tower for images (arXiv 2303.15343): a ViT without a class token.

A query of its own attends to all patches and gives the image's vector. A norm stands in this head,
so that with it the hidden size grows by whole copies.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from . import vit
from .clip_vision_model import DEFAULTS, SIZES, layer_parts

LAYER = "encoder.layers.{}"
OWN: dict[str, Any] = {"writes": "own", "when": "vision_use_head"}


def count_positions(config: Config) -> int:
    """Number of patches."""
    return vit.position_count(config) - 1


def head_parts() -> dict[str, Part]:
    """The query, its attention and its MLP."""
    name, attention = "head", "head.attention"
    kept: dict[str, Any] = {"reads": "own", "bias": True, **OWN}
    copied: dict[str, Any] = kept | {"writes": "activated"}
    qkv: dict[str, Any] = {"fused": ("pool.attn.q", "pool.attn.k", "pool.attn.v"), **OWN}
    return {
        "pool.probe.weight": Part(f"{name}.probe", "one one hidden", **OWN),
        "pool.attn.qkv.weight": Part(
            f"{attention}.in_proj_weight", "hidden -> kv dim + kv dim + kv dim", **qkv
        ),
        "pool.attn.qkv.bias": Part(
            f"{attention}.in_proj_bias", "-> kv dim + kv dim + kv dim", **qkv
        ),
        **linear("pool.attn.o", f"{attention}.out_proj", "kv dim -> hidden", **copied),
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
    causal=False,
    inputs="pixels",
)
