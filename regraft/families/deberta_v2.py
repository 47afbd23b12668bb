"""DeBERTa v2 and v3 (arXiv 2006.03654, 2111.09543): BERT with scores by relative position.

Embeddings of distances go through a norm and each layer's own maps of queries and keys, so that
they grow as embeddings of tokens do.
"""

from collections.abc import Callable
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from . import bert
from .bert import POST_NORM, WRITES_BRANCH, base_prefix, head_defaults, head_linear, mlm_head

HEADS = {
    "DebertaV2Model": "",
    "DebertaV2ForMaskedLM": "mlm",
    "DebertaV2ForSequenceClassification": "first",
    "DebertaV2ForTokenClassification": "tokens",
    "DebertaV2ForQuestionAnswering": "span",
}
LAYER = "{p}encoder.layer.{}"


def count_distances(config: Config) -> int:
    """Rows of the table of distances: as many to the left as to the right."""
    reach = config["max_relative_positions"]
    if reach < 1:
        reach = config["max_position_embeddings"]
    buckets = config["position_buckets"]
    return 2 * int(buckets if buckets > 0 else reach)


def normed_distances(wanted: bool) -> Callable[[Config], bool]:
    """Config -> whether its embeddings of distances are normed, or the opposite."""

    def find(config: Config) -> bool:
        normed = "layer_norm" in str(config["norm_rel_ebd"])
        return bool(config["relative_attention"]) and normed == wanted

    return find


def check_parts(config: Config) -> dict[str, Any]:
    """The pooler's width; RegraftError for parts that the table does not hold."""
    expected = {
        "conv_kernel_size": 0,
        "embedding_size": config["hidden_size"],
        "share_att_key": True,
        "legacy": True,
    }
    if not config["relative_attention"]:
        del expected["share_att_key"]
    before = config.get("_before", {}).get("hidden", config["hidden_size"])
    for key, value in expected.items():
        if config.get(key, value) not in (value, before if key == "embedding_size" else value):
            raise RegraftError(
                f"deberta-v2 with {key} {config[key]} has parts without a table: only models with"
                f" {value} have one"
            )
    widths = [key for key in ("pooler_hidden_size", "embedding_size") if key in config]
    return {key: config["hidden_size"] for key in widths}


def embedding_parts() -> dict[str, Part]:
    """Embeddings of tokens, positions and types, and those of distances."""
    name, encoder = "{p}embeddings", "{p}encoder"
    table: dict[str, Any] = {"stored": "in out", **WRITES_BRANCH}
    distances = f"{encoder}.rel_embeddings.weight"
    normed: dict[str, Any] = {"when": "_normed_distances"}
    return {
        **linear("embed", f"{name}.word_embeddings", "vocab -> hidden", **table),
        **linear(
            "pos", f"{name}.position_embeddings", "pos -> hidden", when="position_biased_input",
            **table,
        ),
        **linear(
            "type", f"{name}.token_type_embeddings", "type -> hidden", when="_typed", **table
        ),
        **norm("norm.embed", f"{name}.LayerNorm", **POST_NORM),
        "distance.weight": Part(distances, "bucket -> hidden", **table, **normed),
        **norm("norm.distance", f"{encoder}.LayerNorm", **POST_NORM, **normed),
        "plain_distance.weight": Part(
            distances, "bucket -> hidden", stored="in out", writes="stream",
            when="_plain_distances",
        ),
    }  # fmt: skip


def layer_parts() -> dict[str, Part]:
    """BERT's layers under names of their own."""
    attention = f"{LAYER}.attention"
    from_stream: dict[str, Any] = {"bias": True, "reads": "stream"}
    names = {"q": "query_proj", "k": "key_proj", "v": "value_proj"}
    maps: dict[str, Part] = {}
    for role, name in names.items():
        maps |= linear(
            f"attn.{role}", f"{attention}.self.{name}", "hidden -> kv dim", **from_stream
        )
    kept = bert.encoder_parts()
    rest = ("attn.o", "norm.attn_post", "mlp.", "norm.mlp_post")
    return {**maps, **{role: part for role, part in kept.items() if role.startswith(rest)}}


anatomy = Anatomy(
    family="deberta-v2",
    parts={
        **embedding_parts(),
        **layer_parts(),
        **mlm_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions",
        ),
        **head_linear("first.transform", "pooler.dense", "hidden -> hidden", "_first"),
        **head_linear("first.label", "classifier", "hidden -> label", "_first", reads="own"),
        **head_linear("tokens", "classifier", "hidden -> label", "_tokens", at="each"),
        **head_linear("span", "qa_outputs", "hidden -> label", "_span", at="each"),
    },
    sizes=(
        *(pair for pair in bert.SIZES if pair[1] != "type"),
        ("_types", "type"),
        ("_distances", "bucket"),
    ),
    slot=f"{LAYER}.attention.self",
    defaults={
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-7,
        "relative_attention": False,
        "max_relative_positions": -1,
        "position_buckets": -1,
        "position_biased_input": True,
        "norm_rel_ebd": "none",
        "conv_kernel_size": 0,
        "share_att_key": False,
        "legacy": True,
        "_typed": lambda config: config["type_vocab_size"] > 0,
        "_types": lambda config: max(config["type_vocab_size"], 1),
        "_normed_distances": normed_distances(True),
        "_plain_distances": normed_distances(False),
        "_distances": count_distances,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    finish=check_parts,
    keeps_softmax="its scores depend on distances through the layer's own maps",
    prefix=base_prefix(HEADS, "deberta."),
    causal=False,
)
