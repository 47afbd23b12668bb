"""RoBERTa (arXiv 1907.11692): BERT with other heads; its table of positions begins behind the padding token's."""

from dataclasses import replace

from . import bert
from .bert import DEFAULTS, IGNORED, flags, mlm, outer, prefixed

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
        **bert.body(),
        **outer("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooler"),
        **mlm("lm_head.dense", "lm_head.layer_norm", "lm_head"),
        **outer("first.transform", "classifier.dense", "hidden -> hidden", "_first"),
        **outer("first.label", "classifier.out_proj", "hidden -> label", "_first", reads="own"),
        **outer("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **outer("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    defaults={**DEFAULTS, **flags(HEADS)},
    ignored={**IGNORED, r"lm_head\.decoder\.bias": "tied: the config shares it with lm_head.bias"},
    prefix=prefixed(HEADS, "roberta."),
)
