"""ModernBERT (arXiv 2412.13663): a pre-norm encoder with gated MLPs and rotary positions.

Two of three layers have a window.

A norm stands behind the embedding, and none before the attention of the first layer.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from . import gemma3_text
from .bert import architecture, base_prefix, head_defaults

HEADS = {
    "ModernBertModel": "",
    "ModernBertForMaskedLM": "mlm",
    "ModernBertForSequenceClassification": "labels",
    "ModernBertForTokenClassification": "labels",
    "ModernBertForQuestionAnswering": "labels",
}
LAYER = "{p}layers.{}"
QKV = ("attn.q", "attn.k", "attn.v")


def is_later(config: Config, layer: int) -> bool:
    """Whether a layer is not the first."""
    return layer > 0


def centered_norm(role: str, name: str, **fields: Any) -> dict[str, Part]:
    """A layer norm whose bias a config key decides about."""
    weight = norm(role, name, centered=True, **fields)[f"{role}.weight"]
    bias = norm(role, name, bias=True, **fields | {"when": "norm_bias"})[f"{role}.bias"]
    return {f"{role}.weight": weight, f"{role}.bias": bias}


def head_norm(role: str, writes: str, when: str) -> dict[str, Part]:
    """The norm of a head; only that of the masked model stands before the output embedding.

    Args:
        role: the role without its ending.
        writes: what reads it.
        when: config key that says whether the class has the head.
    """
    fields: dict[str, Any] = {"norm": True, "reads": "own", "writes": writes}
    gain, bias = "head.norm.weight", "head.norm.bias"
    return {
        f"{role}.weight": Part(gain, "gain hidden", centered=True, when=when, **fields),
        f"{role}.bias": Part(bias, "-> hidden", when=f"{when}_shifted", **fields),
    }


def head_parts() -> dict[str, Part]:
    """The map and norm that all heads begin with, and what each ends in."""
    own: dict[str, Any] = {"reads": "normed", "writes": "own"}
    return {
        "transform.weight": Part("head.dense.weight", "hidden -> hidden", when="_any", **own),
        "transform.bias": Part("head.dense.bias", "-> hidden", when="_biased", **own),
        **head_norm("norm.head", "head", "_mlm"),
        **head_norm("norm.labels", "own", "_labels_head"),
        "head.weight": Part(
            "decoder.weight", "hidden -> vocab", reads="head", when="_mlm",
            unless="tie_word_embeddings",
        ),
        "head.bias": Part("decoder.bias", "-> vocab", when="_decoder_bias"),
        **linear(
            "labels", "classifier", "hidden -> label", bias=True, reads="own", writes="own",
            when="_labels_head",
        ),
    }  # fmt: skip


def has_any(config: Config) -> bool:
    """Whether the class has a head."""
    return bool(HEADS[architecture(config, HEADS)])


heads = head_defaults(HEADS)
anatomy = Anatomy(
    family="modernbert",
    parts={
        **linear(
            "embed", "{p}embeddings.tok_embeddings", "vocab -> hidden", stored="in out",
            writes="branch",
        ),
        **centered_norm("norm.embed", "{p}embeddings.norm", reads="branch", writes="stream"),
        **centered_norm("norm.attn", f"{LAYER}.attn_norm", in_layer=is_later),
        **linear(
            "attn.qkv", f"{LAYER}.attn.Wqkv", "hidden -> kv dim + kv dim + kv dim", fused=QKV,
            bias="attention_bias",
        ),
        **linear("attn.o", f"{LAYER}.attn.Wo", "kv dim -> hidden", bias="attention_bias"),
        **centered_norm("norm.mlp", f"{LAYER}.mlp_norm"),
        **linear(
            "mlp.gate_up", f"{LAYER}.mlp.Wi", "hidden -> ffn + ffn", fused=("mlp.gate", "mlp.up"),
            bias="mlp_bias",
        ),
        **linear("mlp.down", f"{LAYER}.mlp.Wo", "ffn -> hidden", bias="mlp_bias"),
        **centered_norm("norm.final", "{p}final_norm"),
        **head_parts(),
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
        ("max_position_embeddings", "pos"),
        ("_labels", "label"),
    ),
    slot=f"{LAYER}.attn",
    defaults={
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "tie_word_embeddings": True,
        "_any": has_any,
        "_mlm": heads["_mlm"],
        # "_labels" is their number.
        "_labels_head": lambda config: config["_any"] and not config["_mlm"],
        "_labels": heads["_labels"],
        "_biased": lambda config: config["_any"] and config["classifier_bias"],
        "_mlm_shifted": lambda config: config["_mlm"] and config["norm_bias"],
        "_labels_head_shifted": lambda config: config["_labels_head"] and config["norm_bias"],
        "_decoder_bias": lambda config: config["_mlm"] and config["decoder_bias"],
    },
    fixed={"group": 1},
    eps="norm_eps",
    activation="hidden_activation",
    older=gemma3_text.older_config_keys,
    prefix=base_prefix(HEADS, "model."),
    causal=False,
)  # fmt: skip
