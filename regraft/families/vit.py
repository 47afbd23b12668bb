"""ViT (arXiv 2010.11929): a pre-norm encoder of image patches after a class token."""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from .bert import base_prefix, head_defaults, head_linear

HEADS = {"ViTModel": "pooler", "ViTForImageClassification": "classifier"}
LAYER = "{p}encoder.layer.{}"
SIZES = (
    ("hidden_size", "hidden"),
    ("num_hidden_layers", "depth"),
    ("num_attention_heads", "kv"),
    ("head_dim", "dim"),
    ("num_channels", "channel"),
    ("_patch", "patch"),
    ("_positions", "pos"),
    ("_labels", "label"),
)


def height_and_width(value: Any) -> tuple[int, int]:
    """Height and width of a size given as one number or two."""
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[1])
    return int(value), int(value)


def patch_side(config: Config) -> int:
    """The side of a patch in pixels. RegraftError when patches are not square."""
    height, width = height_and_width(config["patch_size"])
    if height != width:
        raise RegraftError(f"patches of {height} x {width}: only square ones have a table")
    return height


def position_count(config: Config) -> int:
    """Number of positions: one for the class token and one for every patch."""
    height, width = height_and_width(config["image_size"])
    patch_height, patch_width = height_and_width(config["patch_size"])
    return 1 + (height // patch_height) * (width // patch_width)


DEFAULTS: dict[str, Any] = {
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
    "_patch": patch_side,
    "_positions": position_count,
}


def embedding_parts() -> dict[str, Part]:
    """Patches, class token and positions."""
    name = "{p}embeddings"
    return {
        "embed.weight": Part(
            f"{name}.patch_embeddings.projection.weight", "hidden channel patch patch", at="patch"
        ),
        "embed.bias": Part(f"{name}.patch_embeddings.projection.bias", "-> hidden"),
        "first.weight": Part(f"{name}.cls_token", "one one hidden"),
        "pos.weight": Part(f"{name}.position_embeddings", "one pos hidden"),
    }


def qkv_parts() -> dict[str, Part]:
    """Queries, keys and values."""
    name = f"{LAYER}.attention.attention"
    return {
        **linear("attn.q", f"{name}.query", "hidden -> kv dim", bias="qkv_bias"),
        **linear("attn.k", f"{name}.key", "hidden -> kv dim", bias="qkv_bias"),
        **linear("attn.v", f"{name}.value", "hidden -> kv dim", bias="qkv_bias"),
    }


anatomy = Anatomy(
    family="vit",
    parts={
        **embedding_parts(),
        **norm("norm.attn", f"{LAYER}.layernorm_before", bias=True),
        **qkv_parts(),
        **linear("attn.o", f"{LAYER}.attention.output.dense", "kv dim -> hidden", bias=True),
        **norm("norm.mlp", f"{LAYER}.layernorm_after", bias=True),
        **linear("mlp.up", f"{LAYER}.intermediate.dense", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.output.dense", "ffn -> hidden", bias=True),
        **norm("norm.final", "{p}layernorm", bias=True),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> pool", "_pooler", reads="normed"),
        **head_linear("classifier", "classifier", "hidden -> label", "_classifier", reads="normed"),
    },
    sizes=(*SIZES, ("intermediate_size", "ffn"), ("pooler_output_size", "pool")),
    slot=f"{LAYER}.attention",
    defaults={
        "patch_size": 16,
        **DEFAULTS,
        "pooler_output_size": lambda config: config["hidden_size"],
        "layer_norm_eps": 1e-12,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    prefix=base_prefix(HEADS, "vit."),
    causal=False,
    inputs="pixels",
)
