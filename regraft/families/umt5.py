"""UMT5 (arXiv 2304.09151): mT5 with a table of distances in every layer."""

from dataclasses import replace

from . import mt5, t5
from .bart import check_class

anatomy = replace(
    mt5.anatomy,
    family="umt5",
    head_scale=t5.anatomy.head_scale,
    parts=t5.t5_parts(bias_in_layers=True),
    prefix=check_class("UMT5ForConditionalGeneration"),
)
