"""BEiT (arXiv 2106.08254): ViT with layer scales and a bias on scores for every distance.

The mean over patches is normed where `use_mean_pooling` is set, else every token is.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from . import vit
from .bert import base_prefix, has_head, head_defaults, head_linear
from .dinov2 import backbone_stage_keys

HEADS = {"BeitModel": "pooler", "BeitForImageClassification": "pooler classifier"}
LAYER = "{p}encoder.layer.{}"
ATTENTION = f"{LAYER}.attention.attention"
BIASES = "relative_position_bias.relative_position_bias_table"
SCALED = "_scaled"


def count_distances(config: Config) -> int:
    """Rows of a table of biases: one for every difference of two patches, and three for the class
    token.
    """
    side = vit.patch_side(config)
    height, width = (size // side for size in vit.height_and_width(config["image_size"]))
    return (2 * height - 1) * (2 * width - 1) + 3


def norms_tokens(config: Config) -> bool:
    """Whether every token is normed at the end."""
    return not config["use_mean_pooling"]


def norms_mean(config: Config) -> bool:
    """Whether the mean over patches is."""
    return bool(config["use_mean_pooling"]) and has_head(config, HEADS, "pooler")


def bias_parts() -> dict[str, Part]:
    """Biases on the scores by distance: of each layer, or one table for all."""
    table: dict[str, Any] = {"stored": "in out", "writes": "own"}
    return {
        "distance.weight": Part(
            f"{ATTENTION}.{BIASES}", "bucket -> kv", when="use_relative_position_bias", **table
        ),
        "shared_distance.weight": Part(
            f"{{p}}encoder.{BIASES}", "bucket -> kv",
            when="use_shared_relative_position_bias", **table,
        ),
    }  # fmt: skip


def embedding_parts() -> dict[str, Part]:
    """Patches, class token, mask, and positions where the config has them."""
    parts = vit.embedding_parts()
    pos = parts.pop("pos.weight")
    return {
        **parts,
        "pos.weight": Part(pos.name, "one pos hidden", when="use_absolute_position_embeddings"),
        "mask.weight": Part("{p}embeddings.mask_token", "one one hidden", when="use_mask_token"),
    }


def layer_parts() -> dict[str, Part]:
    """Attention without biases of keys, and the MLP, each scaled."""
    return {
        **norm("norm.attn", f"{LAYER}.layernorm_before", bias=True),
        **linear("attn.q", f"{ATTENTION}.query", "hidden -> kv dim", bias=True),
        **linear("attn.k", f"{ATTENTION}.key", "hidden -> kv dim"),
        **linear("attn.v", f"{ATTENTION}.value", "hidden -> kv dim", bias=True),
        **linear(
            "attn.o", f"{LAYER}.attention.output.dense", "kv dim -> hidden", bias=True,
            scaled="scale.attn.weight",
        ),
        "scale.attn.weight": Part(f"{LAYER}.lambda_1", "scale hidden", reads="own", when=SCALED),
        **norm("norm.mlp", f"{LAYER}.layernorm_after", bias=True),
        **linear("mlp.up", f"{LAYER}.intermediate.dense", "hidden -> ffn", bias=True),
        **linear(
            "mlp.down", f"{LAYER}.output.dense", "ffn -> hidden", bias=True,
            scaled="scale.mlp.weight",
        ),
        "scale.mlp.weight": Part(f"{LAYER}.lambda_2", "scale hidden", reads="own", when=SCALED),
    }  # fmt: skip


anatomy = Anatomy(
    family="beit",
    parts={
        **embedding_parts(),
        **bias_parts(),
        **layer_parts(),
        **norm("norm.final", "{p}layernorm", bias=True, when="_norms_tokens"),
        **norm("norm.pool", "{p}pooler.layernorm", bias=True, when="_norms_mean"),
        **head_linear("classifier", "classifier", "hidden -> label", "_classifier", reads="normed"),
    },
    sizes=(*vit.SIZES, ("intermediate_size", "ffn"), ("_distances", "bucket")),
    slot=f"{LAYER}.attention",
    defaults={
        "patch_size": 16,
        **vit.DEFAULTS,
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.1,
        "layer_norm_eps": 1e-12,
        SCALED: lambda config: config["layer_scale_init_value"] > 0,
        "_norms_tokens": norms_tokens,
        "_norms_mean": norms_mean,
        "_distances": count_distances,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    finish=backbone_stage_keys,
    prefix=base_prefix(HEADS, "beit."),
    causal=False,
    inputs="pixels",
)
