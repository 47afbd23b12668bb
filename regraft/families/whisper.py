"""Whisper (arXiv 2212.04356): an encoder of log-mel frames behind two convolutions, a decoder.

The second convolution halves the number of frames.
"""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Part, linear, norm
from ..core.anatomy_defaults import no_keys
from . import bart

FILTER: dict[str, Any] = {"stored": "out in tap", "bias": True}
PLACES: dict[str, Any] = {"stored": "in out"}


def audio_parts() -> dict[str, Part]:
    """The convolutions, and positions of the frames that come out of them."""
    first: dict[str, Any] = FILTER | {"reads": "own", "writes": "own", "at": "frame"}
    second: dict[str, Any] = FILTER | {"reads": "own", "writes": "activated", "at": "source"}
    base = bart.ENCODER
    return {
        **linear("encoder.conv.first", f"{base}.conv1", "mel 3 -> hidden", **first),
        **linear("encoder.conv.second", f"{base}.conv2", "hidden 3 -> hidden", **second),
        **linear("encoder.pos", f"{base}.embed_positions", "place -> hidden", **PLACES),
    }


anatomy = replace(
    bart.anatomy,
    family="whisper",
    parts={
        **audio_parts(),
        **bart.layer_parts("encoder", key_bias=False),
        **norm("encoder.norm.final", f"{bart.ENCODER}.layer_norm", bias=True),
        **linear("embed", f"{bart.DECODER}.embed_tokens", "vocab -> hidden", **PLACES),
        **linear("pos", f"{bart.DECODER}.embed_positions", "pos -> hidden", **PLACES),
        **bart.layer_parts("decoder", key_bias=False),
        **norm("norm.final", f"{bart.DECODER}.layer_norm", bias=True, writes="head"),
        "head.weight": Part(
            "proj_out.weight", "hidden -> vocab", unless="tie_word_embeddings", reads="head"
        ),
    },
    sizes=(
        *bart.SHARED_SIZES,
        ("num_mel_bins", "mel"),
        ("max_source_positions", "place"),
        ("max_target_positions", "pos"),
    ),
    defaults=bart.DEFAULTS,
    prefix=bart.check_class("WhisperForConditionalGeneration"),
    finish=no_keys,
    inputs="audio",
)
