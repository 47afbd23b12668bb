"""Llama (arXiv 2302.13971): grouped queries, RMS norms, gated MLP, rotary positions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..core.anatomy_defaults import no_bridge

LAYER = "model.layers.{}"
SIZES = (
    ("vocab_size", "vocab"),
    ("hidden_size", "hidden"),
    ("intermediate_size", "ffn"),
    ("num_hidden_layers", "depth"),
    ("num_key_value_heads", "kv"),
    ("num_attention_heads", "kv group"),
    ("head_dim", "dim"),
)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": lambda config: config["num_attention_heads"],
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}


def kv_heads(missing: int) -> Callable[[Config], int]:
    """The default of classes with one number of heads for a missing key and another for null.

    Args:
        missing: what the class takes when the key is missing; null means as many as query heads.
    """
    return lambda config: (
        int(config["num_attention_heads"]) if "num_key_value_heads" in config else missing
    )


def attention_parts(
    qkv_bias: bool | str, o_bias: bool | str, output: str = "o_proj", **fields: Any
) -> dict[str, Part]:
    """Queries, keys, values and output of softmax attention.

    Args:
        qkv_bias: whether queries, keys and values have biases, or the config key that decides it.
        o_bias: the same for the output.
        output: the class's name of the output projection.
        fields: further ones of all parts, such as `in_layer`.
    """
    attention = f"{LAYER}.self_attn"
    queries, keys = "hidden -> kv group dim", "hidden -> kv dim"
    return {
        **linear("attn.q", f"{attention}.q_proj", queries, bias=qkv_bias, **fields),
        **linear("attn.k", f"{attention}.k_proj", keys, bias=qkv_bias, **fields),
        **linear("attn.v", f"{attention}.v_proj", keys, bias=qkv_bias, **fields),
        **linear(
            "attn.o", f"{attention}.{output}", "kv group dim -> hidden", bias=o_bias, **fields
        ),
    }


def parts(qkv_bias: bool | str, o_bias: bool | str, mlp_bias: bool | str) -> dict[str, Part]:
    """Llama's parts.

    Args:
        qkv_bias: whether queries, keys and values have biases, or the config key that decides it.
        o_bias: the same for the attention's output.
        mlp_bias: the same for the MLP.
    """
    mlp = f"{LAYER}.mlp"

    return {
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm"),
        **attention_parts(qkv_bias, o_bias),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm"),
        **linear("mlp.gate", f"{mlp}.gate_proj", "hidden -> ffn", bias=mlp_bias),
        **linear("mlp.up", f"{mlp}.up_proj", "hidden -> ffn", bias=mlp_bias),
        **linear("mlp.down", f"{mlp}.down_proj", "ffn -> hidden", bias=mlp_bias),
        **norm("norm.final", "model.norm", writes="head"),
        "head.weight": Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings"),
    }


anatomy = Anatomy(
    family="llama",
    parts=parts("attention_bias", "attention_bias", "mlp_bias"),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults={**DEFAULTS, "attention_bias": False, "mlp_bias": False},
    divides=(("hidden_size", "num_attention_heads"),),
    bridge=lambda config: None if config["attention_bias"] or config["mlp_bias"] else "mistral",
)


def variant(family: str, defaults: dict[str, Any], **fields: Any) -> Anatomy:
    """Llama's table for a class that takes any number of heads.

    Args:
        family: its model type.
        defaults: of config keys, beside DEFAULTS.
        fields: further fields of `Anatomy`.
    """
    plain = replace(anatomy, divides=(), bridge=no_bridge)
    biases = {"attention_bias": False, "mlp_bias": False}
    return replace(plain, family=family, defaults={**DEFAULTS, **biases, **defaults}, **fields)
