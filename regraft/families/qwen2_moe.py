"""Qwen2-MoE (arXiv 2407.10671): Qwen2 with routed experts and a shared one in place of the MLP.

Some layers may keep a dense MLP. Files hold the tensors of each expert apart.
"""

from collections.abc import Callable
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama

MLP = f"{LAYER}.mlp"
# The experts' width is `ffn`; the dense layers' and the shared expert's do not grow.
MOE_SIZES = (
    *((("moe_intermediate_size" if axis == "ffn" else key), axis) for key, axis in SIZES),
    ("num_experts", "expert"),
    ("intermediate_size", "dense_ffn"),
)
# Rows of the grouped products over experts are 16 bytes: multiples of 8 numbers in bfloat16.
MULTIPLES = {"hidden": 8, "ffn": 8}


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts."""
    dense = config["mlp_only_layers"] or ()
    return layer not in dense and (layer + 1) % config["decoder_sparse_step"] == 0


def is_dense(config: Config, layer: int) -> bool:
    """Whether a layer has one MLP for all tokens."""
    return not is_sparse(config, layer)


def move_dense_layers(config: Config) -> dict[str, Any]:
    """Dense layers listed by number, where layers move."""
    order = config.get("_order")
    old = [layer for layer in order or () if is_dense(config, layer)]
    if order is None or not old:
        return {}
    dense = [layer for layer, source in enumerate(order) if source in old]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def experts(
    block: str = MLP,
    in_layer: Callable[[Config, int], bool] | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, Part]:
    """A router and gated MLPs, one tensor for each map of each expert.

    Args:
        block: name of the module that holds them.
        in_layer: which layers have experts; None: all.
        names: of gate, up and down.
    """
    expert = f"{block}.experts.{{e}}"
    gate, up, down = (f"{expert}.{name}" for name in names)
    return {
        **linear("mlp.router", f"{block}.gate", "hidden -> expert", in_layer=in_layer),
        **linear("mlp.{e}.gate", gate, "hidden -> ffn", at="routed", in_layer=in_layer),
        **linear("mlp.{e}.up", up, "hidden -> ffn", at="routed", in_layer=in_layer),
        **linear("mlp.{e}.down", down, "ffn -> hidden", at="routed", in_layer=in_layer),
    }


def dense(in_layer: Callable[[Config, int], bool]) -> dict[str, Part]:
    """The MLP of layers without experts."""
    return {
        **linear("mlp.gate", f"{MLP}.gate_proj", "hidden -> dense_ffn", in_layer=in_layer),
        **linear("mlp.up", f"{MLP}.up_proj", "hidden -> dense_ffn", in_layer=in_layer),
        **linear("mlp.down", f"{MLP}.down_proj", "dense_ffn -> hidden", in_layer=in_layer),
    }


def without_mlp(parts: dict[str, Part]) -> dict[str, Part]:
    """Parts without the MLP's."""
    return {role: part for role, part in parts.items() if not role.startswith("mlp.")}


def shared_expert(block: str, only: Callable[[Config, int], bool]) -> dict[str, Part]:
    """The expert that every token goes to, and the gate on its output."""
    expert = f"{block}.shared_expert"
    return {
        **linear("mlp.shared.gate", f"{expert}.gate_proj", "hidden -> shared_ffn", in_layer=only),
        **linear("mlp.shared.up", f"{expert}.up_proj", "hidden -> shared_ffn", in_layer=only),
        **linear("mlp.shared.down", f"{expert}.down_proj", "shared_ffn -> hidden", in_layer=only),
        **linear("mlp.shared_gate", f"{block}.shared_expert_gate", "hidden -> one", in_layer=only),
    }


anatomy = Anatomy(
    family="qwen2_moe",
    parts={
        **without_mlp(llama("qkv_bias", False, False)),
        **dense(is_dense),
        **experts(in_layer=is_sparse),
        **shared_expert(MLP, is_sparse),
    },
    sizes=(*MOE_SIZES, ("shared_expert_intermediate_size", "shared_ffn")),
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": kv_heads(16),
        "qkv_bias": True,
        "intermediate_size": 5632,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    finish=move_dense_layers,
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
)
