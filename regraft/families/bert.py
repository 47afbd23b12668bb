"""BERT (arXiv 1810.04805): an encoder with a norm after each sum.

The class named in the config decides which head a checkpoint has.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..core.anatomy_defaults import label_count
from ..errors import RegraftError

# Class -> heads that it has; a head is a key "_<head>" of the config with defaults filled in.
HEADS = {
    "BertModel": "pooler",
    "BertForMaskedLM": "mlm",
    "BertForPreTraining": "pooler mlm next",
    "BertForNextSentencePrediction": "pooler next",
    "BertForSequenceClassification": "pooler pooled",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "span",
}
SIZES = (
    ("vocab_size", "vocab"),
    ("hidden_size", "hidden"),
    ("hidden_size", "kv dim"),
    ("intermediate_size", "ffn"),
    ("num_hidden_layers", "depth"),
    ("num_attention_heads", "kv"),
    ("max_position_embeddings", "pos"),
    ("type_vocab_size", "type"),
    ("_labels", "label"),
)
LAYER = "{p}encoder.layer.{}"
WRITES_BRANCH: dict[str, Any] = {"writes": "branch"}
# Embeddings and branches are added up first, then normalized: the norm's output is the stream.
POST_NORM: dict[str, Any] = {"bias": True, "reads": "branch", "writes": "stream"}


def architecture(config: Config, table: Mapping[str, str]) -> str:
    """The class that a config names, or the first of the table when it names none.

    RegraftError when the table does not have it.
    """
    name = (config.get("architectures") or list(table))[0]
    if name not in table:
        raise RegraftError(
            f"no table for the class '{name}' of config.json's architectures: "
            f"use {', '.join(table)}"
        )
    return str(name)


def has_head(config: Config, table: Mapping[str, str], head: str) -> bool:
    """Whether the class of a config has a head, one of the words in `table`."""
    return head in table[architecture(config, table)].split()


def head_defaults(table: Mapping[str, str]) -> dict[str, Any]:
    """Defaults for the derived keys of a family's heads.

    "_<head>" says whether the class of the config has the head, "_labels" how many labels it has.
    """
    heads = sorted({head for row in table.values() for head in row.split()})
    return {f"_{head}": partial(has_head, table=table, head=head) for head in heads} | {
        "_labels": label_count
    }


def base_prefix(table: Mapping[str, str], base: str) -> Callable[[Config], str]:
    """A function for `Anatomy.prefix`: the base model's prefix in every class with a head.

    The base model's own checkpoints have names without it.
    """
    return lambda config: base if "For" in architecture(config, table) else ""


def encoder_parts() -> dict[str, Part]:
    """Embeddings and layers."""
    embeddings, attention = "{p}embeddings", f"{LAYER}.attention"
    table: dict[str, Any] = {"stored": "in out", **WRITES_BRANCH}
    # No norm comes before attention and MLP: they read the residual stream itself.
    from_stream: dict[str, Any] = {"bias": True, "reads": "stream"}
    to_branch: dict[str, Any] = {"bias": True, **WRITES_BRANCH}

    return {
        **linear("embed", f"{embeddings}.word_embeddings", "vocab -> hidden", **table),
        **linear("pos", f"{embeddings}.position_embeddings", "pos -> hidden", **table),
        **linear("type", f"{embeddings}.token_type_embeddings", "type -> hidden", **table),
        **norm("norm.embed", f"{embeddings}.LayerNorm", **POST_NORM),
        **linear("attn.q", f"{attention}.self.query", "hidden -> kv dim", **from_stream),
        **linear("attn.k", f"{attention}.self.key", "hidden -> kv dim", **from_stream),
        **linear("attn.v", f"{attention}.self.value", "hidden -> kv dim", **from_stream),
        **linear("attn.o", f"{attention}.output.dense", "kv dim -> hidden", **to_branch),
        **norm("norm.attn_post", f"{attention}.output.LayerNorm", **POST_NORM),
        **linear("mlp.up", f"{LAYER}.intermediate.dense", "hidden -> ffn", **from_stream),
        **linear("mlp.down", f"{LAYER}.output.dense", "ffn -> hidden", **to_branch),
        **norm("norm.mlp_post", f"{LAYER}.output.LayerNorm", **POST_NORM),
    }


def mlm_head(dense: str, layer_norm: str, head: str) -> dict[str, Part]:
    """The head of a masked language model.

    Args:
        dense: name of the map in front of the output embedding.
        layer_norm: name of its norm.
        head: name of the module with the output embedding.
    """
    own: dict[str, Any] = {"bias": True, "when": "_mlm"}
    untied: dict[str, Any] = {"when": "_mlm", "unless": "tie_word_embeddings"}

    # An untied class has two biases and reads the decoder's own; a tied one shares the head's.
    return {
        **linear("transform", dense, "hidden -> hidden", reads="stream", writes="own", **own),
        **norm("norm.head", layer_norm, reads="own", writes="head", **own),
        "head.weight": Part(f"{head}.decoder.weight", "hidden -> vocab", reads="head", **untied),
        "head.bias": Part(f"{head}.bias", "-> vocab", when="_mlm"),
        "head.own.bias": Part(f"{head}.decoder.bias", "-> vocab", **untied),
    }


def head_linear(
    role: str, name: str, axes: str, when: str, reads: str = "stream", at: str = "first"
) -> dict[str, Part]:
    """A linear layer outside the stack that only some classes have.

    Args:
        role: the role without its ending.
        name: the name in the state dict without its ending.
        axes: the weight's signature.
        when: the config key that says whether the class has it.
        reads: activations that it takes.
        at: positions that it is applied to.
    """
    return linear(role, name, axes, bias=True, when=when, reads=reads, writes="own", at=at)


DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "layer_norm_eps": 1e-12,
}

anatomy = Anatomy(
    family="bert",
    parts={
        **encoder_parts(),
        **head_linear("pooler", "{p}pooler.dense", "hidden -> hidden", "_pooler"),
        **mlm_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions",
        ),
        **head_linear("next", "cls.seq_relationship", "hidden -> two", "_next", reads="own"),
        **head_linear("pooled", "classifier", "hidden -> label", "_pooled", reads="own"),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=SIZES,
    slot=f"{LAYER}.attention.self",
    defaults={**DEFAULTS, **head_defaults(HEADS)},
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    prefix=base_prefix(HEADS, "bert."),
    causal=False,
)
