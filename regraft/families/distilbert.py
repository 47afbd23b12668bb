"""DistilBERT (arXiv 1910.01108): BERT without token types and pooler, under names of its own."""

from typing import Any

from ..core.anatomy import Anatomy, Part, linear, norm
from ..core.anatomy_defaults import read_aliases
from .bert import POST_NORM, WRITES_BRANCH, base_prefix, head_defaults, head_linear

HEADS = {
    "DistilBertModel": "",
    "DistilBertForMaskedLM": "mlm",
    "DistilBertForSequenceClassification": "first",
    "DistilBertForTokenClassification": "tokens",
    "DistilBertForQuestionAnswering": "span",
}
LAYER = "{p}transformer.layer.{}"


def encoder_parts() -> dict[str, Part]:
    """Embeddings and layers."""
    embeddings, attention = "{p}embeddings", f"{LAYER}.attention"
    table: dict[str, Any] = {"stored": "in out", **WRITES_BRANCH}
    from_stream: dict[str, Any] = {"bias": True, "reads": "stream"}
    to_branch: dict[str, Any] = {"bias": True, **WRITES_BRANCH}
    return {
        **linear("embed", f"{embeddings}.word_embeddings", "vocab -> hidden", **table),
        **linear("pos", f"{embeddings}.position_embeddings", "pos -> hidden", **table),
        **norm("norm.embed", f"{embeddings}.LayerNorm", **POST_NORM),
        **linear("attn.q", f"{attention}.q_lin", "hidden -> kv dim", **from_stream),
        **linear("attn.k", f"{attention}.k_lin", "hidden -> kv dim", **from_stream),
        **linear("attn.v", f"{attention}.v_lin", "hidden -> kv dim", **from_stream),
        **linear("attn.o", f"{attention}.out_lin", "kv dim -> hidden", **to_branch),
        **norm("norm.attn_post", f"{LAYER}.sa_layer_norm", **POST_NORM),
        **linear("mlp.up", f"{LAYER}.ffn.lin1", "hidden -> ffn", **from_stream),
        **linear("mlp.down", f"{LAYER}.ffn.lin2", "ffn -> hidden", **to_branch),
        **norm("norm.mlp_post", f"{LAYER}.output_layer_norm", **POST_NORM),
    }


def mlm_head() -> dict[str, Part]:
    """The head of the masked language model."""
    own: dict[str, Any] = {"bias": True, "when": "_mlm"}
    axes, weight = "hidden -> hidden", "vocab_projector.weight"
    return {
        **linear("transform", "vocab_transform", axes, reads="stream", writes="own", **own),
        **norm("norm.head", "vocab_layer_norm", reads="own", writes="head", **own),
        "head.weight": Part(
            weight, "hidden -> vocab", reads="head", when="_mlm", unless="tie_word_embeddings"
        ),
        "head.bias": Part("vocab_projector.bias", "-> vocab", when="_mlm"),
    }


anatomy = Anatomy(
    family="distilbert",
    parts={
        **encoder_parts(),
        **mlm_head(),
        **head_linear("first.transform", "pre_classifier", "hidden -> hidden", "_first"),
        **head_linear("first.label", "classifier", "hidden -> label", "_first", reads="own"),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("dim", "hidden"),
        ("dim", "kv dim"),
        ("hidden_dim", "ffn"),
        ("n_layers", "depth"),
        ("n_heads", "kv"),
        ("max_position_embeddings", "pos"),
        ("_labels", "label"),
    ),
    slot=f"{LAYER}.attention",
    defaults={
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "_eps": 1e-12,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    rewrite=read_aliases(
        {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
    ),
    eps="_eps",
    activation="activation",
    rotary=False,
    prefix=base_prefix(HEADS, "distilbert."),
    causal=False,
)
