"""ESM (doi 10.1126/science.ade2574): a pre-norm encoder of proteins, with BERT's names.

A regression over the attention of all layers and heads predicts contacts.
"""

from collections.abc import Callable
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from .bert import base_prefix, head_defaults, head_linear

# Earlier releases stored the frequencies in every layer; the class takes those of the first.
LATER_FREQUENCIES = (
    r"(esm\.)?encoder\.layer\.[1-9]\d*\.attention\.self\.rotary_embeddings\.inv_freq"
)
HEADS = {
    "EsmModel": "pooler",
    "EsmForMaskedLM": "mlm",
    "EsmForSequenceClassification": "first",
    "EsmForTokenClassification": "tokens",
}
LAYER = "{p}encoder.layer.{}"


def has_positions(kind: str) -> Callable[[Config], bool]:
    """Config -> whether its positions are of a kind, "absolute" or "rotary"."""
    return lambda config: config["position_embedding_type"] == kind


def check_parts(config: Config) -> dict[str, Any]:
    """RegraftError for parts without a table, and for other heads where frequencies are stored."""
    if config["is_folding_model"] or config["add_cross_attention"]:
        key = "is_folding_model" if config["is_folding_model"] else "add_cross_attention"
        raise RegraftError(
            f"esm with {key} has parts without a table: only plain encoders have one"
        )
    before = config.get("_before", {}).get("dim")
    dim = config["hidden_size"] // config["num_attention_heads"]
    if config["_rotary"] and before not in (None, dim):
        raise RegraftError(
            f"esm stores the frequencies of its rotary positions, for heads of {before}, not"
            f" {dim}: grow --hidden to a multiple of {before}"
        )
    return {}


def embedding_parts() -> dict[str, Part]:
    """Embeddings of tokens and of positions, if there are any, and the norm of their sum."""
    name = "{p}embeddings"
    table: dict[str, Any] = {"stored": "in out", "writes": "branch"}
    stream: dict[str, Any] = {"bias": True, "reads": "branch", "writes": "stream"}
    return {
        **linear("embed", f"{name}.word_embeddings", "vocab -> hidden", **table),
        **linear("pos", f"{name}.position_embeddings", "pos -> hidden", when="_absolute", **table),
        "frequencies.weight": Part(
            "{p}rotary_embeddings.inv_freq", "bucket", reads="own", writes="own", when="_rotary"
        ),
        **norm("norm.embed", f"{name}.layer_norm", when="emb_layer_norm_before", **stream),
    }


def layer_parts() -> dict[str, Part]:
    """Layers with a norm before each branch."""
    attention = f"{LAYER}.attention"
    return {
        **norm("norm.attn", f"{attention}.LayerNorm", bias=True),
        **linear("attn.q", f"{attention}.self.query", "hidden -> kv dim", bias=True),
        **linear("attn.k", f"{attention}.self.key", "hidden -> kv dim", bias=True),
        **linear("attn.v", f"{attention}.self.value", "hidden -> kv dim", bias=True),
        **linear("attn.o", f"{attention}.output.dense", "kv dim -> hidden", bias=True),
        **norm("norm.mlp", f"{LAYER}.LayerNorm", bias=True),
        **linear("mlp.up", f"{LAYER}.intermediate.dense", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.output.dense", "ffn -> hidden", bias=True),
        **norm("norm.final", "{p}encoder.emb_layer_norm_after", bias=True),
    }


def mlm_head() -> dict[str, Part]:
    """The head of the masked language model: a map, its activation, a norm, the tied embedding."""
    own: dict[str, Any] = {"bias": True, "when": "_mlm"}
    return {
        **linear("transform", "lm_head.dense", "hidden -> hidden", writes="activated", **own),
        **norm("norm.head", "lm_head.layer_norm", reads="activated", writes="head", **own),
        "head.weight": Part(
            "lm_head.decoder.weight", "hidden -> vocab", reads="head", when="_mlm",
            unless="tie_word_embeddings",
        ),
        "head.bias": Part("lm_head.bias", "-> vocab", when="_mlm"),
    }  # fmt: skip


def head_parts() -> dict[str, Part]:
    """What only some classes have, and the regression that all have."""
    first: dict[str, Any] = {"when": "_first"}
    return {
        **mlm_head(),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooler", reads="normed"),
        **head_linear(
            "first.transform", "classifier.dense", "hidden -> hidden", reads="normed", **first
        ),
        **head_linear(
            "first.label", "classifier.out_proj", "hidden -> label", reads="own", **first
        ),
        **head_linear(
            "tokens", "classifier", "hidden -> label", "_tokens", reads="normed", at="each"
        ),
        **linear(
            "contact", "{p}contact_head.regression", "depth kv -> one", bias=True, reads="own",
            writes="own",
        ),
    }  # fmt: skip


anatomy = Anatomy(
    family="esm",
    parts={**embedding_parts(), **layer_parts(), **head_parts()},
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
        ("max_position_embeddings", "pos"),
        ("_frequencies", "bucket"),
        ("_labels", "label"),
    ),
    slot=f"{LAYER}.attention.self",
    ignored={LATER_FREQUENCIES: "the class takes the first layer's"},
    defaults={
        "max_position_embeddings": 1026,
        "position_embedding_type": "absolute",
        "emb_layer_norm_before": False,
        "is_folding_model": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-12,
        "_absolute": has_positions("absolute"),
        "_rotary": has_positions("rotary"),
        "_frequencies": lambda config: max(
            1, config["hidden_size"] // config["num_attention_heads"] // 2
        ),
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    # Where positions are rotary, heads keep their width (`check_parts`).
    rotary=False,
    prefix=base_prefix(HEADS, "esm."),
    finish=check_parts,
    causal=False,
)
