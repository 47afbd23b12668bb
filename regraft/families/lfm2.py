"""LFM2 (Liquid AI, 2025): gated short convolutions, and softmax attention in some layers.

The config's width of the MLP is not that of its maps unless `block_auto_adjust_ff_dim` is false:
the class takes two thirds of it, rounded up. A grown MLP is written with that switch off.
"""

from __future__ import annotations

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..core.anatomy_defaults import read_aliases
from .llama import DEFAULTS, LAYER, SIZES, attention_parts
from .qwen3_5_text import FULL, is_full

read_older_names = read_aliases(
    {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
)


def is_conv(config: Config, layer: int) -> bool:
    """Whether a layer has a short convolution."""
    return not is_full(config, layer)


def layer_types(config: Config) -> list[str]:
    """The kind of each layer: softmax attention in those of `full_attn_idxs`, in all without it."""
    full, depth = config.get("full_attn_idxs"), config["num_hidden_layers"]
    return [FULL if full is None or layer in full else "conv" for layer in range(depth)]


def ffn_width(config: Config) -> int:
    """Outputs of the maps of the MLP."""
    width = int(config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    factor, multiple = config.get("block_ffn_dim_multiplier", 1.0), config["block_multiple_of"]
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


def write_ffn(config: Config) -> dict[str, Any]:
    """The keys of the width of the MLP where it has changed."""
    if config["_ffn"] == ffn_width(config):
        return {}
    return {"intermediate_size": config["_ffn"], "block_auto_adjust_ff_dim": False}


def read(config: Config) -> dict[str, Any]:
    """Older names of keys, and the list of layers with softmax attention as kinds of all layers."""
    keys = read_older_names(config)
    if config.get("full_attn_idxs") is None:
        return keys
    known = config.get("layer_types") or layer_types(config)
    return keys | {"layer_types": known, "full_attn_idxs": None}


def parts() -> dict[str, Part]:
    """All parts."""
    attention, conv, mlp = (f"{LAYER}.{name}" for name in ("self_attn", "conv", "feed_forward"))
    softmax: dict[str, Any] = {"in_layer": is_full}
    short: dict[str, Any] = {"in_layer": is_conv, "bias": "conv_bias"}
    return {
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.operator_norm"),
        **linear(
            "conv.in",
            f"{conv}.in_proj",
            "hidden -> inner + inner + inner",
            fused=("conv.b", "conv.c", "conv.x"),
            **short,
        ),
        "conv.weight": Part(f"{conv}.conv.weight", "inner one tap", in_layer=is_conv),
        "conv.bias": Part(f"{conv}.conv.bias", "-> inner", when="conv_bias", in_layer=is_conv),
        **linear("conv.out", f"{conv}.out_proj", "inner -> hidden", **short),
        **attention_parts(False, False, "out_proj", **softmax),
        **norm("attn.q_norm", f"{attention}.q_layernorm", "dim", **softmax),
        **norm("attn.k_norm", f"{attention}.k_layernorm", "dim", **softmax),
        **norm("norm.mlp", f"{LAYER}.ffn_norm"),
        **linear("mlp.gate", f"{mlp}.w1", "hidden -> ffn"),
        **linear("mlp.up", f"{mlp}.w3", "hidden -> ffn"),
        **linear("mlp.down", f"{mlp}.w2", "ffn -> hidden"),
        **norm("norm.final", "model.embedding_norm", writes="head"),
        "head.weight": Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings"),
    }


anatomy = Anatomy(
    family="lfm2",
    parts=parts(),
    sizes=(
        *(("_ffn" if axes == "ffn" else key, axes) for key, axes in SIZES),
        ("_inner", "inner"),
        ("conv_L_cache", "tap"),
    ),
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "norm_eps": 1e-5,
        "intermediate_size": 12288,
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 256,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": layer_types,
        "_activation": "silu",
        "_ffn": ffn_width,
        "_inner": lambda config: config["hidden_size"],
    },
    eps="norm_eps",
    activation="_activation",
    finish=write_ffn,
    rewrite=read,
    inner_ratio=1,
)
