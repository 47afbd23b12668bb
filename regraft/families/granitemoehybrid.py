"""Granite hybrid (IBM, 2025): Llama with Mamba-2 layers in the place of some softmax layers, and
factors on embeddings, branches, scores and logits. Larger ones have experts beside the MLP.
"""

from __future__ import annotations

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from .granite_swa import softmax_scale
from .granitemoe import experts
from .llama import DEFAULTS, LAYER, SIZES, attention_parts
from .llama import parts as llama_parts
from .qwen2_moe import MULTIPLES

MAMBA = f"{LAYER}.mamba"
# `layer_types` of today's class, then of older releases.
LINEAR = ("linear_attention", "mamba")


def is_linear(config: Config, layer: int) -> bool:
    """Whether a layer is a Mamba-2 layer."""
    types = config["layer_types"]
    return layer >= len(types) or types[layer] in LINEAR


def is_softmax(config: Config, layer: int) -> bool:
    """Whether a layer is a softmax layer."""
    return not is_linear(config, layer)


def conv_channels(config: Config) -> int:
    """Channels of x, B and C, which go through the convolution."""
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    return int(inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"])


def read_limits(config: Config) -> dict[str, Any]:
    """The limits of the steps, whose infinity transformers writes as {"__float__": "Infinity"}."""
    limits = config.get("time_step_limit")
    if not isinstance(limits, list):
        return {}
    numbers = [one["__float__"] if isinstance(one, dict) else one for one in limits]
    return {"time_step_limit": [float(one) for one in numbers]}


def keep_inner_width(config: Config) -> dict[str, Any]:
    """The factor from `hidden` to the width inside Mamba-2 layers, which stays as it is.

    RegraftError when it is no whole number: the class has no key for that width.
    """
    hidden, before = config["hidden_size"], config["_before"]
    inner = before["ssm_head"] * before["ssm_dim"]
    if hidden == before["hidden"]:
        return {}
    if inner % hidden:
        raise RegraftError(
            f"{config['model_type']} with hidden {hidden} cannot keep Mamba-2 layers of {inner}"
            f" channels, which its class has as a multiple of hidden: give a divisor of {inner}"
        )
    return {"mamba_expand": inner // hidden}


def mamba_parts() -> dict[str, Part]:
    """What a Mamba-2 layer has: gate, x, B, C and dt of the input in one matrix."""
    inner, keys = "ssm_head ssm_dim", "ssm_group ssm_state"
    maps = ("mamba.gate", "mamba.x", "mamba.b", "mamba.c", "mamba.dt")
    outputs = f"{inner} + {inner} + {keys} + {keys} + ssm_head"
    rows = {
        **linear(
            "mamba.in", f"{MAMBA}.in_proj", f"hidden -> {outputs}", bias="mamba_proj_bias",
            fused=maps, in_layer=is_linear,
        ),
        **linear(
            "mamba.o", f"{MAMBA}.out_proj", f"{inner} -> hidden", bias="mamba_proj_bias",
            in_layer=is_linear,
        ),
    }  # fmt: skip
    plain = {
        "conv.weight": ("conv1d.weight", "ssm_conv one tap", None),
        "conv.bias": ("conv1d.bias", "-> ssm_conv", "mamba_conv_bias"),
        "dt_bias": ("dt_bias", "-> ssm_head", None),
        "A_log": ("A_log", "-> ssm_head", None),
        "D": ("D", "-> ssm_head", None),
    }
    for role, (name, axes, when) in plain.items():
        rows[f"mamba.{role}"] = Part(f"{MAMBA}.{name}", axes, when=when, in_layer=is_linear)
    return rows | norm("mamba.norm", f"{MAMBA}.norm", inner, in_layer=is_linear)


def parts() -> dict[str, Part]:
    """Llama's parts, softmax in some layers only, and the Mamba-2 layers."""
    mlp, rows = f"{LAYER}.shared_mlp", llama_parts("attention_bias", "attention_bias", False)
    return {
        **{role: part for role, part in rows.items() if not role.startswith(("attn.", "mlp."))},
        **attention_parts("attention_bias", "attention_bias", in_layer=is_softmax),
        **mamba_parts(),
        **linear(
            "mlp.gate_up",
            f"{mlp}.input_linear",
            "hidden -> ffn + ffn",
            fused=("mlp.gate", "mlp.up"),
        ),
        **linear("mlp.down", f"{mlp}.output_linear", "ffn -> hidden"),
        **experts("moe", "routed_ffn", when="_has_experts"),
        **norm("norm.final", "model.norm", writes="head"),
    }


MAMBA_SIZES = (
    ("mamba_n_heads", "ssm_head"),
    ("mamba_d_head", "ssm_dim"),
    ("mamba_n_groups", "ssm_group"),
    ("mamba_d_state", "ssm_state"),
    ("mamba_d_conv", "tap"),
    ("_conv_channels", "ssm_conv"),
)

anatomy = Anatomy(
    family="granitemoehybrid",
    parts=parts(),
    sizes=tuple(("shared_intermediate_size" if axes == "ffn" else key, axes) for key, axes in SIZES)
    + MAMBA_SIZES
    + (("_experts", "expert"), ("intermediate_size", "routed_ffn")),
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "shared_intermediate_size": 1024,
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "layer_types": (),
        "mamba_n_heads": 128,
        "mamba_d_head": lambda config: (
            config.get("mamba_expand", 2) * config["hidden_size"] // config["mamba_n_heads"]
        ),
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "_conv_channels": conv_channels,
        "intermediate_size": 11008,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "_has_experts": lambda config: bool(config["num_local_experts"]),
        "_experts": lambda config: config["num_local_experts"] or 1,
    },
    finish=keep_inner_width,
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
    scale=softmax_scale,
    rewrite=read_limits,
    rotates=lambda config, layer: config.get("position_embedding_type") == "rope",
    served_only=True,
    closed={"expert": "more of them beside Mamba-2 layers are not proven to be exact"},
)
