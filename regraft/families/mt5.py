"""mT5 (arXiv 2010.11934): T5 with other tokens, and gated MLPs."""

from dataclasses import replace

from . import t5
from .bart import check_class

anatomy = replace(
    t5.anatomy,
    family="mt5",
    defaults=t5.anatomy.defaults | {"feed_forward_proj": "gated-gelu"},
    head_scale="",  # its class does not divide what the head reads
    prefix=check_class("MT5ForConditionalGeneration"),
)
