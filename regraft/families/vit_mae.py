"""ViT-MAE (arXiv 2111.06377): a ViT that sees some patches, and a small decoder for the others.

The encoder grows; the decoder of the class for pretraining reads it and stays as it is.
"""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Part, linear, norm
from . import vit
from .bert import base_prefix, head_defaults

HEADS = {"ViTMAEModel": "", "ViTMAEForPreTraining": "decoder"}
LAYER = "decoder.decoder_layers.{}"
OWN: dict[str, Any] = {"reads": "own", "writes": "own", "when": "_decoder"}


def decoder_layer() -> dict[str, Part]:
    """One of the decoder's layers, with ViT's names."""
    attention = f"{LAYER}.attention.attention"
    fields: dict[str, Any] = OWN | {"stack": "decoder_depth"}
    hidden, mapping = "decoder_hidden", "decoder_hidden -> decoder_hidden"
    shared: dict[str, Any] = {"bias": "_decoder_bias", **fields}
    return {
        **norm("decoder.norm.attn", f"{LAYER}.layernorm_before", hidden, bias=True, **fields),
        **linear("decoder.attn.q", f"{attention}.query", mapping, **shared),
        **linear("decoder.attn.k", f"{attention}.key", mapping, **shared),
        **linear("decoder.attn.v", f"{attention}.value", mapping, **shared),
        **linear(
            "decoder.attn.o", f"{LAYER}.attention.output.dense", mapping, bias=True, **fields
        ),
        **norm("decoder.norm.mlp", f"{LAYER}.layernorm_after", hidden, bias=True, **fields),
        **linear(
            "decoder.mlp.up", f"{LAYER}.intermediate.dense", "decoder_hidden -> decoder_ffn",
            bias=True, **fields,
        ),
        **linear(
            "decoder.mlp.down", f"{LAYER}.output.dense", "decoder_ffn -> decoder_hidden",
            bias=True, **fields,
        ),
    }  # fmt: skip


def decoder_parts() -> dict[str, Part]:
    """The decoder, of which one map alone reads the encoder."""
    return {
        **linear(
            "decoder.embed", "decoder.decoder_embed", "hidden -> decoder_hidden", bias=True,
            **OWN | {"reads": "normed"},
        ),
        "decoder.mask.weight": Part("decoder.mask_token", "one one decoder_hidden", **OWN),
        "decoder.pos.weight": Part("decoder.decoder_pos_embed", "one pos decoder_hidden", **OWN),
        **decoder_layer(),
        **norm("decoder.norm.final", "decoder.decoder_norm", "decoder_hidden", bias=True, **OWN),
        **linear(
            "decoder.pixels", "decoder.decoder_pred", "decoder_hidden -> patch patch channel",
            bias=True, **OWN,
        ),
    }  # fmt: skip


anatomy = replace(
    vit.anatomy,
    family="vit_mae",
    parts={
        **{
            role: part
            for role, part in vit.anatomy.parts.items()
            if role.partition(".")[0] not in ("pooler", "classifier")
        },
        **decoder_parts(),
    },
    sizes=(
        *(pair for pair in vit.SIZES if pair[1] not in ("dim", "label")),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("decoder_hidden_size", "decoder_hidden"),
        ("decoder_intermediate_size", "decoder_ffn"),
        ("decoder_num_hidden_layers", "decoder_depth"),
    ),
    defaults={
        "patch_size": 16,
        **{key: value for key, value in vit.DEFAULTS.items() if key != "head_dim"},
        "decoder_hidden_size": 512,
        "decoder_intermediate_size": 2048,
        "decoder_num_hidden_layers": 8,
        "mask_ratio": 0.75,
        "layer_norm_eps": 1e-12,
        **head_defaults(HEADS),
        "_decoder_bias": lambda config: config["_decoder"] and config["qkv_bias"],
    },
    prefix=base_prefix(HEADS, "vit."),
    inputs="masked pixels",
)
