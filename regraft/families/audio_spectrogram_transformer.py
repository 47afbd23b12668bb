"""AST (arXiv 2104.01778): DeiT over the overlapping patches of a spectrogram."""

from dataclasses import replace

from ..core.anatomy import Config, Part, norm
from . import deit, vit
from .bert import base_prefix, head_defaults, head_linear

HEADS = {"ASTModel": "", "ASTForAudioClassification": "classifier"}


def count_positions(config: Config) -> int:
    """One position for every patch, for the class token and for that of distillation."""
    side = vit.patch_side(config)
    frequencies = (config["num_mel_bins"] - side) // config["frequency_stride"] + 1
    times = (config["max_length"] - side) // config["time_stride"] + 1
    return int(frequencies * times + 2)


def body_parts() -> dict[str, Part]:
    """DeiT's embeddings and layers; a spectrogram has one channel."""
    left_out = ("pooler", "classifier", "teacher", "embed", "norm.final")
    parts = {
        role: part for role, part in deit.anatomy.parts.items() if not role.startswith(left_out)
    }
    projection = "{p}embeddings.patch_embeddings.projection"
    return {
        "embed.weight": Part(f"{projection}.weight", "hidden one patch patch", at="patch"),
        "embed.bias": Part(f"{projection}.bias", "-> hidden"),
        **parts,
    }


anatomy = replace(
    deit.anatomy,
    family="audio-spectrogram-transformer",
    parts={
        **body_parts(),
        **norm("norm.final", "{p}layernorm", bias=True, unless="_classifier"),
        # The head norms what is normed already, so that only whole copies keep its mean.
        **norm("norm.body", "{p}layernorm", bias=True, when="_classifier", writes="activated"),
        **norm(
            "norm.head", "classifier.layernorm", bias=True, when="_classifier", reads="activated",
            writes="normed",
        ),
        **head_linear(
            "classifier", "classifier.dense", "hidden -> label", "_classifier", reads="normed"
        ),
    },
    sizes=(
        *(pair for pair in vit.SIZES if pair[1] not in ("dim", "channel")),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
    ),
    defaults={
        "patch_size": 16,
        "qkv_bias": True,
        "frequency_stride": 10,
        "time_stride": 10,
        "max_length": 1024,
        "num_mel_bins": 128,
        "layer_norm_eps": 1e-12,
        "_patch": vit.patch_side,
        "_positions": count_positions,
        **head_defaults(HEADS),
    },
    prefix=base_prefix(HEADS, "audio_spectrogram_transformer."),
    inputs="spectrogram",
)  # fmt: skip
