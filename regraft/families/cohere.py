"""Command R (Cohere, 2024): one layer norm without a bias feeds attention and MLP in parallel.

Neighbouring coordinates of a head turn together; logits have a constant factor.
"""

from typing import Any

from ..core.anatomy import Anatomy, Part, linear, norm
from ..core.part import TIED_HEAD
from .llama import DEFAULTS, LAYER, SIZES, attention_parts

ATTENTION, MLP, BIAS = f"{LAYER}.self_attn", f"{LAYER}.mlp", "attention_bias"
QK: dict[str, Any] = {"norm": True, "centered": True, "writes": "normed", "when": "use_qk_norm"}


def parts() -> dict[str, Part]:
    """Llama's parts with one norm a layer, which subtracts the mean."""
    return {
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm", centered=True),
        **attention_parts(BIAS, BIAS),
        **linear("mlp.gate", f"{MLP}.gate_proj", "hidden -> ffn"),
        **linear("mlp.up", f"{MLP}.up_proj", "hidden -> ffn"),
        **linear("mlp.down", f"{MLP}.down_proj", "ffn -> hidden"),
        **norm("norm.final", "model.norm", centered=True, writes="head"),
        "head.weight": TIED_HEAD,
    }


def qk_norms() -> dict[str, Part]:
    """Norms of each head, with gains of its own."""
    return {
        "attn.q_norm.weight": Part(f"{ATTENTION}.q_norm.weight", "kv group dim", **QK),
        "attn.k_norm.weight": Part(f"{ATTENTION}.k_norm.weight", "kv dim", **QK),
    }


anatomy = Anatomy(
    family="cohere",
    parts={**parts(), **qk_norms()},
    sizes=SIZES,
    slot=ATTENTION,
    defaults={
        **DEFAULTS,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "use_qk_norm": False,
    },
    eps="layer_norm_eps",
    rotary_pairs=True,
    rotary_tables="neighbours",
    factors=("logit_scale",),
)
