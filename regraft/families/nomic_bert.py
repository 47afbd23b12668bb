"""Nomic BERT (arXiv 2402.01613): BERT with rotary positions, gated MLPs and few biases."""

from typing import Any

from ..core.anatomy import Anatomy, Part, linear, norm
from .bert import POST_NORM, WRITES_BRANCH, base_prefix, head_defaults, head_linear, mlm_head

HEADS = {
    "NomicBertModel": "",
    "NomicBertForMaskedLM": "mlm",
    "NomicBertForSequenceClassification": "pooled",
    "NomicBertForTokenClassification": "tokens",
}
LAYER = "{p}encoder.layers.{}"
QKV = ("attn.q", "attn.k", "attn.v")


def encoder_parts() -> dict[str, Part]:
    """Embeddings and layers."""
    embeddings, mlp = "{p}embeddings", f"{LAYER}.mlp"
    table: dict[str, Any] = {"stored": "in out", **WRITES_BRANCH}
    qkv = "hidden -> kv dim + kv dim + kv dim"
    return {
        **linear("embed", f"{embeddings}.word_embeddings", "vocab -> hidden", **table),
        **linear("type", f"{embeddings}.token_type_embeddings", "type -> hidden", **table),
        **norm("norm.embed", "{p}emb_ln", **POST_NORM),
        **linear("attn.qkv", f"{LAYER}.attn.Wqkv", qkv, fused=QKV, reads="stream"),
        **linear("attn.o", f"{LAYER}.attn.out_proj", "kv dim -> hidden", **WRITES_BRANCH),
        **norm("norm.attn_post", f"{LAYER}.norm1", **POST_NORM),
        **linear("mlp.gate", f"{mlp}.fc12", "hidden -> ffn", reads="stream"),
        **linear("mlp.up", f"{mlp}.fc11", "hidden -> ffn", reads="stream"),
        **linear("mlp.down", f"{mlp}.fc2", "ffn -> hidden", **WRITES_BRANCH),
        **norm("norm.mlp_post", f"{LAYER}.norm2", **POST_NORM),
    }


anatomy = Anatomy(
    family="nomic_bert",
    parts={
        **encoder_parts(),
        **mlm_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.layer_norm",
            "cls.predictions",
        ),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooled"),
        **head_linear("pooled", "classifier", "hidden -> label", "_pooled", reads="own"),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("intermediate_size", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
        ("head_dim", "dim"),
        ("max_position_embeddings", "pos"),
        ("type_vocab_size", "type"),
        ("_labels", "label"),
    ),
    slot=f"{LAYER}.attn",
    defaults={
        "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": 2048,
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-12,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    prefix=base_prefix(HEADS, "nomic_bert."),
    causal=False,
)
