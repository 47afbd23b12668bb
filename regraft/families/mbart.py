"""mBART (arXiv 2001.08210): BART with norms before attention and MLP, and one behind each stack."""

from dataclasses import replace

from ..core.anatomy_defaults import no_keys
from . import bart

anatomy = replace(
    bart.anatomy,
    family="mbart",
    parts={
        **bart.embedding_parts(normed=True),
        **bart.layer_parts("encoder"),
        **bart.layer_parts("decoder"),
        **bart.final_norms(),
        **bart.head_parts(),
    },
    prefix=bart.check_class("MBartForConditionalGeneration"),
    finish=no_keys,
)
