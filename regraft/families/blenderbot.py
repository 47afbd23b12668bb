"""Blenderbot (arXiv 2004.13637): Pegasus with learned positions, for dialogues."""

from dataclasses import replace

from . import bart, pegasus

anatomy = replace(
    pegasus.anatomy,
    family="blenderbot",
    prefix=bart.check_class("BlenderbotForConditionalGeneration"),
)
