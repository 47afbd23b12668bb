"""ELECTRA (arXiv 2003.10555): BERT's layers behind embeddings that may be narrower.

A map from their width to the hidden size stands between where the two differ. The head of the
masked model goes back to the width of the embeddings, which does not grow.
"""

from dataclasses import replace
from typing import Any

from ..core.anatomy import Config, Part, linear, norm
from ..errors import RegraftError
from . import bert
from .bert import DEFAULTS, SIZES, base_prefix, head_defaults, head_linear

HEADS = {
    "ElectraModel": "",
    "ElectraForMaskedLM": "mlm",
    "ElectraForPreTraining": "replaced",
    "ElectraForSequenceClassification": "first",
    "ElectraForTokenClassification": "tokens",
    "ElectraForQuestionAnswering": "span",
}


def is_narrow(config: Config) -> bool:
    """Whether embeddings have another width than the layers."""
    return bool(config["embedding_size"] != config["hidden_size"])


def check_projection(config: Config) -> dict[str, Any]:
    """RegraftError where the map from the embeddings' width comes or goes."""
    before = config.get("_before", {}).get("hidden", config["hidden_size"])
    equal = (config["embedding_size"] == config["hidden_size"], config["embedding_size"] == before)
    if equal[0] != equal[1]:
        raise RegraftError(
            f"electra has embeddings of {config['embedding_size']} and a map to its hidden size"
            f" only where that is another: it cannot grow from {before} to"
            f" {config['hidden_size']}, leave --hidden out or give another size"
        )
    return {}


def embedding_parts(project: str, when: str | None = None) -> dict[str, Part]:
    """Embeddings of the embeddings' own width, with their norm and the map to the layers.

    Args:
        project: name of the map.
        when: config key that says whether there is one; None: always.
    """
    name = "{p}embeddings"
    table: dict[str, Any] = {"stored": "in out", "writes": "own"}
    fields: dict[str, Any] = {"bias": True, "reads": "own", "writes": "own"}
    return {
        **linear("embed", f"{name}.word_embeddings", "vocab -> embed", **table),
        **linear("pos", f"{name}.position_embeddings", "pos -> embed", **table),
        **linear("type", f"{name}.token_type_embeddings", "type -> embed", **table),
        **norm("norm.embed", f"{name}.LayerNorm", "embed", **fields),
        **linear(
            "project", project, "embed -> hidden", bias=True, reads="own", writes="stream",
            when=when,
        ),
    }  # fmt: skip


def mlm_head(transform: str, head: str, bias: str) -> dict[str, Part]:
    """The head of the masked language model, which ends in the width of the embeddings.

    Args:
        transform: name of the module with its map and norm.
        head: name of the output embedding.
        bias: of the output.
    """
    own: dict[str, Any] = {"bias": True, "when": "_mlm"}
    untied: dict[str, Any] = {"when": "_mlm", "unless": "tie_word_embeddings"}
    return {
        **linear(
            "transform", f"{transform}.dense", "hidden -> embed", reads="stream", writes="own",
            **own,
        ),
        **norm("norm.head", f"{transform}.LayerNorm", "embed", reads="own", writes="own", **own),
        "head.weight": Part(f"{head}.weight", "embed -> vocab", reads="own", **untied),
        "head.bias": Part(bias, "-> vocab", when="_mlm"),
    }  # fmt: skip


def replaced_head() -> dict[str, Part]:
    """The head that says which tokens were replaced."""
    name = "discriminator_predictions"
    fields: dict[str, Any] = {"when": "_replaced", "at": "each"}
    return {
        **head_linear("replaced", f"{name}.dense", "hidden -> hidden", **fields),
        **head_linear(
            "replaced.label", f"{name}.dense_prediction", "hidden -> one", reads="own", **fields
        ),
    }


def layer_parts() -> dict[str, Part]:
    """BERT's layers."""
    return {
        role: part for role, part in bert.encoder_parts().items() if "encoder.layer" in part.name
    }


anatomy = replace(
    bert.anatomy,
    family="electra",
    parts={
        **embedding_parts("{p}embeddings_project", "_narrow"),
        **layer_parts(),
        **mlm_head("generator_predictions", "generator_lm_head", "generator_lm_head.bias"),
        **replaced_head(),
        **head_linear("first.transform", "classifier.dense", "hidden -> hidden", "_first"),
        **head_linear(
            "first.label", "classifier.out_proj", "hidden -> label", "_first", reads="own"
        ),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=(*SIZES, ("embedding_size", "embed")),
    defaults={
        **DEFAULTS,
        "embedding_size": 128,
        "_narrow": is_narrow,
        **head_defaults(HEADS),
    },
    finish=check_projection,
    prefix=base_prefix(HEADS, "electra."),
)
