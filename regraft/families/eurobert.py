"""EuroBERT (arXiv 2503.05500): Llama's layers without a causal mask, and BERT's heads."""

from dataclasses import replace

from ..core.anatomy import Part
from ..core.anatomy_defaults import no_bridge
from . import llama
from .bert import head_defaults, head_linear

HEADS = {
    "EuroBertModel": "",
    "EuroBertForMaskedLM": "mlm",
    "EuroBertForSequenceClassification": "first",
    "EuroBertForTokenClassification": "tokens",
}

anatomy = replace(
    llama.anatomy,
    family="eurobert",
    parts={
        **llama.anatomy.parts,
        "head.weight": Part(
            "lm_head.weight", "hidden -> vocab", reads="head", when="_mlm",
            unless="tie_word_embeddings",
        ),
        **head_linear("first.transform", "dense", "hidden -> hidden", "_first", reads="head"),
        **head_linear("first.label", "classifier", "hidden -> label", "_first", reads="own"),
        **head_linear(
            "tokens", "classifier", "hidden -> label", "_tokens", reads="head", at="each"
        ),
    },
    sizes=(*llama.SIZES, ("_labels", "label")),
    defaults={**llama.anatomy.defaults, "rms_norm_eps": 1e-5, **head_defaults(HEADS)},
    divides=(),
    bridge=no_bridge,
    causal=False,
)  # fmt: skip
