"""Marian (arXiv 1804.00344): BART without norms on embeddings, and with sinusoids for positions."""

from dataclasses import replace

from ..core.anatomy_defaults import no_keys
from . import bart

SINUSOIDS = "its class computes sinusoids for positions, which depend on it"

anatomy = replace(
    bart.anatomy,
    family="marian",
    parts={
        **bart.embedding_parts(positions=False),
        **bart.layer_parts("encoder", post_norm=True),
        **bart.layer_parts("decoder", post_norm=True),
        **bart.head_parts(reads="stream"),
    },
    sizes=(*bart.SHARED_SIZES, ("max_position_embeddings", "pos")),
    defaults=bart.DEFAULTS,
    ignored={
        r"model\.(en|de)coder\.embed_positions\.weight": "buffer: sinusoids of the class",
    },
    prefix=bart.check_class("MarianMTModel"),
    finish=no_keys,
    closed=bart.CLOSED | dict.fromkeys(("hidden", "kv", "dim"), SINUSOIDS),
)
