"""Blenderbot's smallest model (arXiv 2004.13637): BART without rows before the first position."""

from dataclasses import replace

from . import bart

anatomy = replace(
    bart.anatomy,
    family="blenderbot-small",
    sizes=(*bart.SHARED_SIZES, ("max_position_embeddings", "pos")),
    defaults=bart.DEFAULTS,
    prefix=bart.check_class("BlenderbotSmallForConditionalGeneration"),
)
