"""OLMoE (arXiv 2409.02060): Llama with experts, and query and key norms over all heads together."""

from typing import Any

from ..core.anatomy import Anatomy, Config, norm
from ..core.anatomy_defaults import read_aliases
from ..errors import RegraftError
from .llama import DEFAULTS, LAYER, SIZES
from .llama import parts as llama
from .qwen2_moe import MULTIPLES, experts, without_mlp

ATTENTION = f"{LAYER}.self_attn"
# The class sizes the norm on queries by hidden: hidden = heads * head_dim.
COUPLED = ("hidden_size", "kv group dim")


def check_clip(config: Config) -> dict[str, Any]:
    """Refuse wider heads where queries, keys and values are clipped; gives no config keys.

    Keys of wider heads are scaled, so that they would be clipped elsewhere.
    """
    clip, before = config.get("clip_qkv"), config.get("_before", {}).get("dim")
    if clip is not None and config["head_dim"] != before:
        raise RegraftError(
            f"clip_qkv = {clip:g} cuts keys, which wider heads scale: keep --head-dim {before}"
        )
    return {}


anatomy = Anatomy(
    family="olmoe",
    parts={
        **without_mlp(llama("attention_bias", "attention_bias", False)),
        **norm("attn.q_norm", f"{ATTENTION}.q_norm", "kv group dim"),
        **norm("attn.k_norm", f"{ATTENTION}.k_norm", "kv dim"),
        **experts(),
    },
    sizes=(*SIZES, COUPLED, ("num_experts", "expert")),
    slot=ATTENTION,
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    rewrite=read_aliases({"num_local_experts": "num_experts"}),
    finish=check_clip,
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
)
