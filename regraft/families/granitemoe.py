"""Granite MoE (IBM, 2024): Granite with experts, all of which are in one tensor."""

from dataclasses import replace

from ..core.anatomy import linear
from . import granite
from .llama import LAYER, SIZES
from .llama import parts as llama
from .qwen2_moe import MULTIPLES, without_mlp

MOE = f"{LAYER}.block_sparse_moe"

anatomy = replace(
    granite.anatomy,
    family="granitemoe",
    parts={
        **without_mlp(llama("attention_bias", "attention_bias", False)),
        **linear("mlp.router", f"{MOE}.router.layer", "hidden -> expert"),
        **linear(
            "mlp.gate_up",
            f"{MOE}.input_linear",
            "hidden -> expert ffn + expert ffn",
            stored="expert out in",
            fused=("mlp.gate", "mlp.up"),
            at="routed",
        ),
        **linear(
            "mlp.down",
            f"{MOE}.output_linear",
            "ffn -> expert hidden",
            stored="expert out in",
            at="routed",
        ),
    },
    sizes=(*SIZES, ("num_local_experts", "expert")),
    defaults={
        **granite.anatomy.defaults,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
)
