"""DINOv3 (arXiv 2508.10104): ViT with registers and layer scales.

Height and width turn queries and keys.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from . import vit
from .dinov2 import backbone_stage_keys

LAYER = "layer.{}"
ATTENTION, MLP, BIAS = f"{LAYER}.attention", f"{LAYER}.mlp", "mlp_bias"
ATTN: dict[str, Any] = {"scaled": "scale.attn.weight", "bias": "proj_bias"}
DOWN: dict[str, Any] = {"scaled": "scale.mlp.weight", "bias": BIAS}


def position_count(config: Config) -> int:
    """Number of tokens: the first, the registers, and one for every patch."""
    return vit.position_count(config) + int(config["num_register_tokens"])


def check_heads(config: Config) -> dict[str, Any]:
    """The stages of a backbone; refuses wider heads, whose angles of height and width move."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    before = config.get("_before", {}).get("dim", dim)
    if dim != before:
        raise RegraftError(
            f"dinov3_vit turns heads of {dim} by other angles than those of {before}: use --hidden"
            f" {config['num_attention_heads'] * before}, or more heads"
        )
    return backbone_stage_keys(config)


def embedding_parts() -> dict[str, Part]:
    """Patches and the tokens before them."""
    name = "embeddings"
    return {
        "embed.weight": Part(
            f"{name}.patch_embeddings.weight", "hidden channel patch patch", at="patch"
        ),
        "embed.bias": Part(f"{name}.patch_embeddings.bias", "-> hidden"),
        "first.weight": Part(f"{name}.cls_token", "one one hidden"),
        "mask.weight": Part(f"{name}.mask_token", "one one hidden"),
        "registers.weight": Part(f"{name}.register_tokens", "one register hidden"),
    }


anatomy = Anatomy(
    family="dinov3_vit",
    parts={
        **embedding_parts(),
        **norm("norm.attn", f"{LAYER}.norm1", bias=True),
        **linear("attn.q", f"{ATTENTION}.q_proj", "hidden -> kv dim", bias="query_bias"),
        **linear("attn.k", f"{ATTENTION}.k_proj", "hidden -> kv dim", bias="key_bias"),
        **linear("attn.v", f"{ATTENTION}.v_proj", "hidden -> kv dim", bias="value_bias"),
        **linear("attn.o", f"{ATTENTION}.o_proj", "kv dim -> hidden", **ATTN),
        "scale.attn.weight": Part(f"{LAYER}.layer_scale1.lambda1", "scale hidden", reads="own"),
        **norm("norm.mlp", f"{LAYER}.norm2", bias=True),
        "mlp.gate.weight": Part(f"{MLP}.gate_proj.weight", "hidden -> ffn", when="use_gated_mlp"),
        "mlp.gate.bias": Part(f"{MLP}.gate_proj.bias", "-> ffn", when="_gate_bias"),
        **linear("mlp.up", f"{MLP}.up_proj", "hidden -> ffn", bias=BIAS),
        **linear("mlp.down", f"{MLP}.down_proj", "ffn -> hidden", **DOWN),
        "scale.mlp.weight": Part(f"{LAYER}.layer_scale2.lambda1", "scale hidden", reads="own"),
        **norm("norm.final", "norm", bias=True),
    },
    sizes=(
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
        ("num_channels", "channel"),
        ("num_register_tokens", "register"),
        ("_patch", "patch"),
        ("_positions", "pos"),
    ),
    slot=ATTENTION,
    defaults={
        "patch_size": 16,
        "num_channels": 3,
        "image_size": 224,
        "num_register_tokens": 0,
        "_patch": vit.patch_side,
        "_positions": position_count,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": False,
        "_gate_bias": lambda config: config["use_gated_mlp"] and config["mlp_bias"],
        "layer_norm_eps": 1e-5,
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    finish=check_heads,
    causal=False,
    inputs="pixels",
)
