"""Phi-3 (arXiv 2404.14219): Llama with fused queries, keys and values, and fused gate and up."""

from typing import Any

from ..core.anatomy import Anatomy, Config, linear, older_rope_keys
from ..errors import RegraftError
from .llama import DEFAULTS, LAYER, SIZES
from .llama import parts as llama

QKV = ("attn.q", "attn.k", "attn.v")
FACTORS = ("short_factor", "long_factor")
# Llama's parts that are fused here.
SPLIT = ("attn.q.", "attn.k.", "attn.v.", "mlp.gate.", "mlp.up.")


def check_head_dim(config: Config) -> dict[str, Any]:
    """Refuse long-rope factors when hidden // heads is not head_dim; gives no config keys.

    The class expects as many factors as hidden // heads needs.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, dim = config["num_attention_heads"], config["head_dim"]
    if rope.get("short_factor") and config["hidden_size"] // heads != dim:
        raise RegraftError(
            f"phi3 with long-rope factors wants hidden // heads to be head_dim {dim}, "
            f"got {config['hidden_size']} // {heads}: use --hidden {heads * dim}"
        )
    return {}


def older_config_keys(config: Config) -> dict[str, Any]:
    """Older classes take exactly three keys in `rope_scaling`.

    The original context length stands beside it.
    """
    keys = older_rope_keys(config)
    if rope := keys.get("rope_scaling"):
        keys["rope_scaling"] = {"type": rope["rope_type"]} | {key: rope.get(key) for key in FACTORS}
        if "original_max_position_embeddings" in rope:
            keys["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return keys


anatomy = Anatomy(
    family="phi3",
    parts={
        **{
            role: part
            for role, part in llama(False, False, False).items()
            if not role.startswith(SPLIT)
        },
        **linear(
            "attn.qkv",
            f"{LAYER}.self_attn.qkv_proj",
            "hidden -> kv group dim + kv dim + kv dim",
            fused=QKV,
        ),
        **linear(
            "mlp.gate_up",
            f"{LAYER}.mlp.gate_up_proj",
            "hidden -> ffn + ffn",
            fused=("mlp.gate", "mlp.up"),
        ),
    },
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**DEFAULTS, "rms_norm_eps": 1e-5},
    finish=check_head_dim,
    older=older_config_keys,
)
