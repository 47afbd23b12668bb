"""PLBART (arXiv 2103.06333): BART on programs, whose embeddings are scaled by default."""

from dataclasses import replace

from . import bart

anatomy = replace(
    bart.anatomy,
    family="plbart",
    defaults={**bart.anatomy.defaults, "scale_embedding": True},
    prefix=bart.check_class("PLBartForConditionalGeneration"),
)
