"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with routed experts in place of the MLP."""

from ..core.anatomy import Anatomy
from ..core.anatomy_defaults import read_aliases
from . import qwen3
from .llama import LAYER, kv_heads
from .qwen2_moe import (
    MOE_SIZES,
    MULTIPLES,
    dense,
    experts,
    is_dense,
    is_sparse,
    move_dense_layers,
    without_mlp,
)

anatomy = Anatomy(
    family="qwen3_moe",
    parts={
        **without_mlp(qwen3.anatomy.parts),
        **dense(is_dense),
        **experts(in_layer=is_sparse),
    },
    sizes=MOE_SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        **qwen3.anatomy.defaults,
        "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
        "num_key_value_heads": kv_heads(4),
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    rewrite=read_aliases({"num_local_experts": "num_experts"}),
    finish=move_dense_layers,
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
)
