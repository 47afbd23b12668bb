"""GLM-4 of 2024 (arXiv 2406.12793): Llama with fused gate and up, and rotary positions on
neighbouring coordinates of half a head.
"""

from ..core.anatomy import Anatomy, Part, linear
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama
from .qwen2_moe import without_mlp

MLP = f"{LAYER}.mlp"


def parts() -> dict[str, Part]:
    """Llama's parts, with gate and up in one tensor."""
    return {
        **without_mlp(llama("attention_bias", False, False)),
        **linear(
            "mlp.gate_up",
            f"{MLP}.gate_up_proj",
            "hidden -> ffn + ffn",
            fused=("mlp.gate", "mlp.up"),
        ),
        **linear("mlp.down", f"{MLP}.down_proj", "ffn -> hidden"),
    }


anatomy = Anatomy(
    family="glm",
    parts=parts(),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "head_dim": 128,
        "num_key_value_heads": kv_heads(2),
        "attention_bias": True,
        "rms_norm_eps": 1.5625e-07,
        "_rotary_share": {"partial_rotary_factor": 0.5},
    },
    rotary_pairs=True,
)
