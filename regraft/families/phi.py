"""Phi (arXiv 2306.11644): one layer norm feeds attention and MLP in parallel.

Rotary positions are partial, and every map has a bias.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..core.part import TIED_HEAD
from ..errors import RegraftError
from .llama import DEFAULTS, LAYER, SIZES

ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
QK: dict[str, Any] = {"bias": True, "when": "qk_layernorm"}


def check_head_dim(config: Config) -> dict[str, Any]:
    """Refuse query and key norms when hidden // heads is not head_dim; gives no config keys.

    The class sizes these norms by hidden // heads.
    """
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    if config["qk_layernorm"] and hidden // heads != dim:
        raise RegraftError(
            f"phi with qk_layernorm wants hidden // heads to be head_dim {dim}, "
            f"got {hidden} // {heads}: use --hidden {heads * dim}"
        )
    return {}


anatomy = Anatomy(
    family="phi",
    parts={
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm", bias=True),
        **linear("attn.q", f"{ATTENTION}.q_proj", "hidden -> kv group dim", bias=True),
        **linear("attn.k", f"{ATTENTION}.k_proj", "hidden -> kv dim", bias=True),
        **linear("attn.v", f"{ATTENTION}.v_proj", "hidden -> kv dim", bias=True),
        **norm("attn.q_norm", f"{ATTENTION}.q_layernorm", "dim", **QK),
        **norm("attn.k_norm", f"{ATTENTION}.k_layernorm", "dim", **QK),
        **linear("attn.o", f"{ATTENTION}.dense", "kv group dim -> hidden", bias=True),
        **linear("mlp.up", f"{MLP}.fc1", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{MLP}.fc2", "ffn -> hidden", bias=True),
        **norm("norm.final", "model.final_layernorm", bias=True, writes="head"),
        "head.weight": TIED_HEAD,
        "head.bias": Part("lm_head.bias", "-> vocab"),
    },
    sizes=SIZES,
    slot=ATTENTION,
    defaults={
        **DEFAULTS,
        "qk_layernorm": False,
        "layer_norm_eps": 1e-5,
        "_rotary_share": {"partial_rotary_factor": 0.5},
    },
    eps="layer_norm_eps",
    finish=check_head_dim,
)
