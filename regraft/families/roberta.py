"""RoBERTa (arXiv 1907.11692): BERT with other heads.

Its table of positions starts after the index of the padding token.
"""

from dataclasses import replace

from ..core.anatomy import Anatomy
from . import bert
from .bert import DEFAULTS, base_prefix, head_defaults, head_linear, mlm_head

HEADS = {
    "Model": "pooler",
    "ForMaskedLM": "mlm",
    "ForSequenceClassification": "first",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "span",
}


def name_heads(start: str) -> dict[str, str]:
    """The heads of classes whose names begin with `start`."""
    return {f"{start}{end}": heads for end, heads in HEADS.items()}


def variant(family: str, start: str) -> Anatomy:
    """RoBERTa's table for the same classes under other names.

    Args:
        family: model type.
        start: what names of its classes begin with.
    """
    heads = name_heads(start)
    return replace(
        anatomy,
        family=family,
        defaults={**DEFAULTS, "pad_token_id": 1, **head_defaults(heads)},
        prefix=base_prefix(heads, "roberta."),
    )


anatomy = replace(
    bert.anatomy,
    family="roberta",
    parts={
        **bert.encoder_parts(),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooler"),
        **mlm_head("lm_head.dense", "lm_head.layer_norm", "lm_head"),
        **head_linear("first.transform", "classifier.dense", "hidden -> hidden", "_first"),
        **head_linear(
            "first.label", "classifier.out_proj", "hidden -> label", "_first", reads="own"
        ),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    defaults={**DEFAULTS, "pad_token_id": 1, **head_defaults(name_heads("Roberta"))},
    # The class counts positions from the token after it.
    not_null=("pad_token_id",),
    prefix=base_prefix(name_heads("Roberta"), "roberta."),
)
