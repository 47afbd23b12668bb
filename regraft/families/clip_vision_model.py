"""CLIP's tower for images (arXiv 2103.00020): a ViT that norms patches and positions first."""

from collections.abc import Callable, Mapping
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from . import vit
from .bert import architecture, head_defaults

HEADS = {"CLIPVisionModel": "", "CLIPVisionModelWithProjection": "projection"}
LAYER = "{p}encoder.layers.{}"
SIZES = (
    ("hidden_size", "hidden"),
    ("hidden_size", "kv dim"),
    ("num_hidden_layers", "depth"),
    ("num_attention_heads", "kv"),
    ("intermediate_size", "ffn"),
    ("num_channels", "channel"),
    ("_patch", "patch"),
    ("_positions", "pos"),
)
DEFAULTS = {key: value for key, value in vit.DEFAULTS.items() if key != "head_dim"}


def layer_parts(layer: str) -> dict[str, Part]:
    """Layers with a norm before each branch, as both towers have them, and SigLIP's.

    Args:
        layer: name of a layer.
    """
    return {
        **norm("norm.attn", f"{layer}.layer_norm1", bias=True),
        **linear("attn.q", f"{layer}.self_attn.q_proj", "hidden -> kv dim", bias=True),
        **linear("attn.k", f"{layer}.self_attn.k_proj", "hidden -> kv dim", bias=True),
        **linear("attn.v", f"{layer}.self_attn.v_proj", "hidden -> kv dim", bias=True),
        **linear("attn.o", f"{layer}.self_attn.out_proj", "kv dim -> hidden", bias=True),
        **norm("norm.mlp", f"{layer}.layer_norm2", bias=True),
        **linear("mlp.up", f"{layer}.mlp.fc1", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{layer}.mlp.fc2", "ffn -> hidden", bias=True),
    }


def embedding_parts() -> dict[str, Part]:
    """Patches, class token and positions, which are added up and normed."""
    name, patches = "{p}embeddings", "hidden channel patch patch"
    branch: dict[str, Any] = {"writes": "branch"}
    return {
        "embed.weight": Part(f"{name}.patch_embedding.weight", patches, at="patch", **branch),
        "first.weight": Part(f"{name}.class_embedding", "hidden", **branch),
        **linear("pos", f"{name}.position_embedding", "pos -> hidden", stored="in out", **branch),
        **norm("norm.embed", "{p}pre_layrnorm", bias=True, reads="branch", writes="stream"),
    }


def tower_prefix(heads: Mapping[str, str], prefix: str) -> Callable[[Config], str]:
    """A function for `Anatomy.prefix`: the tower's prefix in the class with a projection.

    Args:
        heads: of the tower's classes.
        prefix: name of the tower, with a dot.
    """
    return lambda config: prefix if architecture(config, heads).endswith("Projection") else ""


anatomy = Anatomy(
    family="clip_vision_model",
    parts={
        **embedding_parts(),
        **layer_parts(LAYER),
        **norm("norm.final", "{p}post_layernorm", bias=True),
        "projection.weight": Part(
            "visual_projection.weight", "hidden -> pool", reads="normed", writes="own", at="first",
            when="_projection",
        ),
    },
    sizes=(*SIZES, ("projection_dim", "pool")),
    slot=f"{LAYER}.self_attn",
    defaults={
        "patch_size": 32,
        **DEFAULTS,
        "projection_dim": 512,
        "layer_norm_eps": 1e-5,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    prefix=tower_prefix(HEADS, "vision_model."),
    causal=False,
    inputs="pixels",
)  # fmt: skip
