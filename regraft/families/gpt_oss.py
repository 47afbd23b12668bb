"""gpt-oss (arXiv 2508.10925): experts with biases in one tensor, a learned sink per head in every
softmax, and a window in every second layer.
"""

from typing import Any

from ..core.anatomy import Anatomy, Part, linear
from ..core.anatomy_defaults import read_aliases
from .granite_swa import sinks
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama
from .qwen2_moe import MULTIPLES, without_mlp

MLP = f"{LAYER}.mlp"
# Weights and biases have names of their own, so each is a part without an ending.
STACKED: dict[str, Any] = {"stored": "expert in out", "at": "routed"}
GATE_UP = ("mlp.gate", "mlp.up")


def experts() -> dict[str, Part]:
    """All experts' maps, whose rows of gate and up alternate, and their biases."""
    names = {key: f"{MLP}.experts.{key}_proj" for key in ("gate_up", "down")}
    gate_up, rows = "hidden -> expert ffn two", "-> expert ffn two"
    return {
        "mlp.gate_up.weight": Part(names["gate_up"], gate_up, fused=GATE_UP, **STACKED),
        "mlp.gate_up.bias": Part(f"{names['gate_up']}_bias", rows, fused=GATE_UP, **STACKED),
        "mlp.down.weight": Part(names["down"], "ffn -> expert hidden", **STACKED),
        "mlp.down.bias": Part(f"{names['down']}_bias", "-> expert hidden", **STACKED),
    }


anatomy = Anatomy(
    family="gpt_oss",
    parts={
        **without_mlp(llama("attention_bias", "attention_bias", False)),
        **sinks(),
        **linear("mlp.router", f"{MLP}.router", "hidden -> expert", bias=True),
        **experts(),
    },
    sizes=(*SIZES, ("num_local_experts", "expert")),
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "head_dim": 64,
        "num_key_value_heads": kv_heads(8),
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    rewrite=read_aliases({"num_experts": "num_local_experts"}),
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
    rotary_tables="once",
)
