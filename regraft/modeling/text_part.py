"""The language model of a model that may have other parts beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..core.shapes import Int
from .mixer_slot import TEXT_AND_IMAGE


def find_text_part(model: PreTrainedModel) -> Any:
    """The language model inside a model of several parts, without its head; others as they are."""
    whole = model.config.get_text_config() is model.config
    return model if whole else model.get_decoder()


def run_text_part(
    model: PreTrainedModel, position_ids: Int[Tensor, "batch time"], **inputs: Any
) -> Any:
    """The output of a model's decoder, without its head and without a cache.

    Args:
        model: a causal transformers model.
        position_ids: which restart where a document begins.
        inputs: further arguments of the decoder, such as `input_ids`.
    """
    decoder: Any = model.get_decoder()
    # Classes with M-RoPE know documents apart by the first of four axes alone.
    if hasattr(getattr(decoder, "rotary_emb", None), "mrope_section"):
        position_ids = position_ids.expand(TEXT_AND_IMAGE, -1, -1)
    return decoder(position_ids=position_ids, use_cache=False, **inputs)
