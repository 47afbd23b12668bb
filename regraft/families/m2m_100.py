"""M2M-100 (arXiv 2010.11125) and NLLB: norms before attention and MLP, sinusoids for positions."""

from dataclasses import replace

from ..core.anatomy_defaults import no_keys
from . import bart
from .marian import SINUSOIDS

anatomy = replace(
    bart.anatomy,
    family="m2m_100",
    parts={
        **bart.embedding_parts(positions=False),
        **bart.layer_parts("encoder"),
        **bart.layer_parts("decoder"),
        **bart.final_norms(),
        **bart.head_parts(bias=False),
    },
    sizes=bart.SHARED_SIZES,
    defaults=bart.DEFAULTS | {"scale_embedding": True, "activation_function": "relu"},
    ignored={r"model\.(en|de)coder\.embed_positions\.weights": "buffer: sinusoids of the class"},
    prefix=bart.check_class("M2M100ForConditionalGeneration"),
    finish=no_keys,
    closed=bart.CLOSED | dict.fromkeys(("hidden", "kv", "dim"), SINUSOIDS),
)
