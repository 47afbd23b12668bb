"""MPNet (arXiv 2004.09297): BERT without token types, whose scores get a bias by distance.

All layers share the table of biases, one column a head.
"""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Part, linear, norm
from . import bert
from .bert import POST_NORM, WRITES_BRANCH, base_prefix, head_defaults, head_linear, mlm_head

HEADS = {
    "MPNetModel": "pooler",
    "MPNetForMaskedLM": "mlm",
    "MPNetForSequenceClassification": "first",
    "MPNetForTokenClassification": "tokens",
    "MPNetForQuestionAnswering": "span",
}
LAYER = "{p}encoder.layer.{}"


def encoder_parts() -> dict[str, Part]:
    """Embeddings, biases and layers."""
    embeddings, attention = "{p}embeddings", f"{LAYER}.attention"
    table: dict[str, Any] = {"stored": "in out", **WRITES_BRANCH}
    from_stream: dict[str, Any] = {"bias": True, "reads": "stream"}
    to_branch: dict[str, Any] = {"bias": True, **WRITES_BRANCH}
    biases = "{p}encoder.relative_attention_bias.weight"
    return {
        **linear("embed", f"{embeddings}.word_embeddings", "vocab -> hidden", **table),
        **linear("pos", f"{embeddings}.position_embeddings", "pos -> hidden", **table),
        **norm("norm.embed", f"{embeddings}.LayerNorm", **POST_NORM),
        "distance.weight": Part(biases, "bucket -> kv", stored="in out", writes="own"),
        **linear("attn.q", f"{attention}.attn.q", "hidden -> kv dim", **from_stream),
        **linear("attn.k", f"{attention}.attn.k", "hidden -> kv dim", **from_stream),
        **linear("attn.v", f"{attention}.attn.v", "hidden -> kv dim", **from_stream),
        **linear("attn.o", f"{attention}.attn.o", "kv dim -> hidden", **to_branch),
        **norm("norm.attn_post", f"{attention}.LayerNorm", **POST_NORM),
        **linear("mlp.up", f"{LAYER}.intermediate.dense", "hidden -> ffn", **from_stream),
        **linear("mlp.down", f"{LAYER}.output.dense", "ffn -> hidden", **to_branch),
        **norm("norm.mlp_post", f"{LAYER}.output.LayerNorm", **POST_NORM),
    }


anatomy = replace(
    bert.anatomy,
    family="mpnet",
    parts={
        **encoder_parts(),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooler"),
        **mlm_head("lm_head.dense", "lm_head.layer_norm", "lm_head"),
        **head_linear("first.transform", "classifier.dense", "hidden -> hidden", "_first"),
        **head_linear(
            "first.label", "classifier.out_proj", "hidden -> label", "_first", reads="own"
        ),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=(
        *(pair for pair in bert.SIZES if pair[1] != "type"),
        ("relative_attention_num_buckets", "bucket"),
    ),
    slot=f"{LAYER}.attention",
    defaults={
        **bert.DEFAULTS,
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        **head_defaults(HEADS),
    },
    # The class counts positions from the token after it.
    not_null=("pad_token_id",),
    prefix=base_prefix(HEADS, "mpnet."),
)
