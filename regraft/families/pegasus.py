"""Pegasus (arXiv 1912.08777): mBART without norms on embeddings.

Its positions are sinusoids, which its files hold as a table that training leaves alone.
"""

from dataclasses import replace

from ..core.anatomy_defaults import no_keys
from . import bart

anatomy = replace(
    bart.anatomy,
    family="pegasus",
    parts={
        **bart.embedding_parts(),
        **bart.layer_parts("encoder"),
        **bart.layer_parts("decoder"),
        **bart.final_norms(),
        **bart.head_parts(),
    },
    sizes=(*bart.SHARED_SIZES, ("max_position_embeddings", "pos")),
    defaults=bart.DEFAULTS,
    prefix=bart.check_class("PegasusForConditionalGeneration"),
    finish=no_keys,
)
