"""Qwen3.5's text model (Qwen, 2026): layers of gated softmax attention and of gated delta rule.

Softmax attention has a norm on each head's queries and keys and a sigmoid gate per output, whose
projection lies behind each head's query. The other layers have heads of their own number and width:
`key_head` heads of queries and keys, each shared by `value_group` heads of values.
"""

from __future__ import annotations

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from .llama import LAYER, SIZES

FULL, LINEAR = "full_attention", "linear_attention"
UNIT: dict[str, Any] = {"unit": True}


def is_full(config: Config, layer: int) -> bool:
    """Whether a layer has softmax attention."""
    return bool(config["layer_types"][layer] == FULL)


def is_linear(config: Config, layer: int) -> bool:
    """Whether a layer has the gated delta rule."""
    return not is_full(config, layer)


def layer_types(config: Config) -> list[str]:
    """Softmax attention in the last layer of every `full_attention_interval`."""
    interval = int(config.get("full_attention_interval") or 4)
    depth = int(config["num_hidden_layers"])
    return [LINEAR if (layer + 1) % interval else FULL for layer in range(depth)]


def conv_channels(config: Config) -> int:
    """Channels of the convolution: queries, keys and values."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    return int(2 * keys + values)


def softmax_parts() -> dict[str, Part]:
    """The parts of softmax attention."""
    attention = f"{LAYER}.self_attn"
    own: dict[str, Any] = {"in_layer": is_full}
    biased = {"bias": "attention_bias"} | own
    return {
        **linear(
            "attn.q_gate", f"{attention}.q_proj", "hidden -> kv group two dim",
            fused=("attn.q", "attn.gate"), **biased,
        ),
        **linear("attn.k", f"{attention}.k_proj", "hidden -> kv dim", **biased),
        **linear("attn.v", f"{attention}.v_proj", "hidden -> kv dim", **biased),
        **linear("attn.o", f"{attention}.o_proj", "kv group dim -> hidden", **biased),
        **norm("attn.q_norm", f"{attention}.q_norm", "dim", **UNIT, **own),
        **norm("attn.k_norm", f"{attention}.k_norm", "dim", **UNIT, **own),
    }  # fmt: skip


def delta_parts() -> dict[str, Part]:
    """The parts of the gated delta rule."""
    delta = f"{LAYER}.linear_attn"
    own: dict[str, Any] = {"in_layer": is_linear}
    keys, states = "key_head key_dim", "key_head value_group"
    values = f"{states} value_dim"
    return {
        **linear(
            "delta.qkv",
            f"{delta}.in_proj_qkv",
            f"hidden -> {keys} + {keys} + {values}",
            fused=("delta.q", "delta.k", "delta.v"),
            **own,
        ),
        "delta.conv.weight": Part(f"{delta}.conv1d.weight", "channel one kernel", **own),
        **linear("delta.gate", f"{delta}.in_proj_z", f"hidden -> {values}", **own),
        **linear("delta.beta", f"{delta}.in_proj_b", f"hidden -> {states}", **own),
        **linear("delta.decay", f"{delta}.in_proj_a", f"hidden -> {states}", **own),
        "delta.decay.bias": Part(f"{delta}.dt_bias", f"-> {states}", **own),
        "delta.rate": Part(f"{delta}.A_log", f"-> {states}", **own),
        **norm("delta.norm", f"{delta}.norm", "value_dim", **own),
        **linear("delta.o", f"{delta}.out_proj", f"{values} -> hidden", **own),
    }


def parts() -> dict[str, Part]:
    """All parts."""
    mlp = f"{LAYER}.mlp"
    return {
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm", **UNIT),
        **softmax_parts(),
        **delta_parts(),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", **UNIT),
        **linear("mlp.gate", f"{mlp}.gate_proj", "hidden -> ffn"),
        **linear("mlp.up", f"{mlp}.up_proj", "hidden -> ffn"),
        **linear("mlp.down", f"{mlp}.down_proj", "ffn -> hidden"),
        **norm("norm.final", "model.norm", writes="head", **UNIT),
        "head.weight": Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings"),
    }


anatomy = Anatomy(
    family="qwen3_5_text",
    parts=parts(),
    sizes=(
        *SIZES,
        ("linear_num_key_heads", "key_head"),
        ("linear_num_value_heads", "key_head value_group"),
        ("linear_key_head_dim", "key_dim"),
        ("linear_value_head_dim", "value_dim"),
        ("linear_conv_kernel_dim", "kernel"),
        ("_conv_channels", "channel"),
    ),
    slot=f"{LAYER}.self_attn",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "layer_types": layer_types,
        "_conv_channels": conv_channels,
    },
    served_only=True,
    closed=dict.fromkeys(
        ("kv", "group", "dim"), "the gate of each head is packed with its queries in one tensor"
    ),
)
