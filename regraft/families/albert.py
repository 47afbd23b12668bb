"""ALBERT (arXiv 1909.11942): BERT whose layers share one set of weights, behind narrow embeddings.

A layer more would change what the model computes, so that hidden, MLP and heads grow alone.
"""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Config, Part, linear, norm
from ..errors import RegraftError
from . import bert
from .bert import DEFAULTS, POST_NORM, SIZES, WRITES_BRANCH, base_prefix, head_defaults, head_linear
from .electra import embedding_parts, mlm_head

HEADS = {
    "AlbertModel": "pooler",
    "AlbertForMaskedLM": "mlm",
    "AlbertForPreTraining": "pooler mlm next",
    "AlbertForSequenceClassification": "pooler pooled",
    "AlbertForTokenClassification": "tokens",
    "AlbertForQuestionAnswering": "span",
}
SHARED = "{p}encoder.albert_layer_groups.0.albert_layers.0"


def check_groups(config: Config) -> dict[str, Any]:
    """RegraftError where layers share more than one set of weights."""
    for key in ("num_hidden_groups", "inner_group_num"):
        if config[key] != 1:
            raise RegraftError(
                f"albert with {key} {config[key]} has several sets of layers, which its table does"
                " not hold: only models with one have a table"
            )
    return {}


def layer_parts() -> dict[str, Part]:
    """The one layer."""
    attention = f"{SHARED}.attention"
    from_stream: dict[str, Any] = {"bias": True, "reads": "stream"}
    to_branch: dict[str, Any] = {"bias": True, **WRITES_BRANCH}
    return {
        **linear("attn.q", f"{attention}.query", "hidden -> kv dim", **from_stream),
        **linear("attn.k", f"{attention}.key", "hidden -> kv dim", **from_stream),
        **linear("attn.v", f"{attention}.value", "hidden -> kv dim", **from_stream),
        **linear("attn.o", f"{attention}.dense", "kv dim -> hidden", **to_branch),
        **norm("norm.attn_post", f"{attention}.LayerNorm", **POST_NORM),
        **linear("mlp.up", f"{SHARED}.ffn", "hidden -> ffn", **from_stream),
        **linear("mlp.down", f"{SHARED}.ffn_output", "ffn -> hidden", **to_branch),
        **norm("norm.mlp_post", f"{SHARED}.full_layer_layer_norm", **POST_NORM),
    }


anatomy = replace(
    bert.anatomy,
    family="albert",
    parts={
        **embedding_parts("{p}encoder.embedding_hidden_mapping_in"),
        **layer_parts(),
        **head_linear("pooler", "{p}pooler", "hidden -> hidden", "_pooler"),
        **mlm_head("predictions", "predictions.decoder", "predictions.bias"),
        "head.own.bias": Part(
            "predictions.decoder.bias", "-> vocab", when="_mlm", unless="tie_word_embeddings"
        ),
        **head_linear("next", "sop_classifier.classifier", "hidden -> label", "_next", reads="own"),
        **head_linear("pooled", "classifier", "hidden -> label", "_pooled", reads="own"),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=(*SIZES, ("embedding_size", "embed")),
    defaults={
        **DEFAULTS,
        "embedding_size": 128,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        "_mapping": True,
        **head_defaults(HEADS),
    },
    finish=check_groups,
    slot=f"{SHARED}.attention",
    keeps_softmax="all layers share one set of weights",
    closed={"depth": "all layers share one set of weights: grow --hidden, --ffn or --heads"},
    prefix=base_prefix(HEADS, "albert."),
)
