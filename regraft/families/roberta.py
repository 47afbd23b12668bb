"""RoBERTa (arXiv 1907.11692): BERT with other heads.

Its table of positions starts after the index of the padding token.
"""

from dataclasses import replace

from . import bert
from .bert import DEFAULTS, base_prefix, head_defaults, head_linear, mlm_head

HEADS = {
    "RobertaModel": "pooler",
    "RobertaForMaskedLM": "mlm",
    "RobertaForSequenceClassification": "first",
    "RobertaForTokenClassification": "tokens",
    "RobertaForQuestionAnswering": "span",
}

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
    defaults={**DEFAULTS, "pad_token_id": 1, **head_defaults(HEADS)},
    # The class counts positions from the token after it.
    not_null=("pad_token_id",),
    prefix=base_prefix(HEADS, "roberta."),
)
