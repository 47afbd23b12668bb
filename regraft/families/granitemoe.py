"""Granite MoE (IBM, 2024): Granite with experts, all of which are in one tensor."""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Part, linear
from . import granite
from .llama import LAYER, SIZES
from .llama import parts as llama
from .qwen2_moe import MULTIPLES, without_mlp

MOE = f"{LAYER}.block_sparse_moe"


def experts(role: str = "mlp", width: str = "ffn", when: str | None = None) -> dict[str, Part]:
    """The router and the experts, all of them in one tensor for each map.

    Args:
        role: what their roles begin with.
        width: the axis of their width.
        when: config key that says whether there are experts; None: there are.
    """
    stacked: dict[str, Any] = {"stored": "expert out in", "at": "routed", "when": when}
    up, down = f"hidden -> expert {width} + expert {width}", f"{width} -> expert hidden"
    packed = (f"{role}.gate", f"{role}.up")
    return {
        **linear(f"{role}.router", f"{MOE}.router.layer", "hidden -> expert", when=when),
        **linear(f"{role}.gate_up", f"{MOE}.input_linear", up, fused=packed, **stacked),
        **linear(f"{role}.down", f"{MOE}.output_linear", down, **stacked),
    }


anatomy = replace(
    granite.anatomy,
    family="granitemoe",
    parts={
        **without_mlp(llama("attention_bias", "attention_bias", False)),
        **experts(),
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
