"""OPT (arXiv 2205.01068): learned positions, layer norms with a fixed epsilon, ReLU.

The table of positions begins with two rows that no text uses.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, linear, norm
from ..core.part import TIED_HEAD
from ..errors import RegraftError

DECODER = "model.decoder"
LAYER = f"{DECODER}.layers.{{}}"
BIAS = "enable_bias"
NORM: dict[str, Any] = {"bias": True, "when": "layer_norm_elementwise_affine"}
# What changes where norms are or what they have -> the value that the table is for.
SWITCHES = {
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


def refuse_other_norms(config: Config) -> dict[str, Any]:
    """Refuse norms in other places, or without parameters; gives no config keys."""
    for key, value in SWITCHES.items():
        if bool(config.get(key, value)) != value:
            raise RegraftError(
                f"opt with {key} = {config[key]} has other norms than the table, which grows those"
                f" with {value}: give another OPT than the one of 350M"
            )
    return {}


anatomy = Anatomy(
    family="opt",
    parts={
        **linear("embed", f"{DECODER}.embed_tokens", "vocab -> hidden", stored="in out"),
        **linear("pos", f"{DECODER}.embed_positions", "place -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.self_attn_layer_norm", **NORM),
        **linear("attn.q", f"{LAYER}.self_attn.q_proj", "hidden -> kv dim", bias=BIAS),
        **linear("attn.k", f"{LAYER}.self_attn.k_proj", "hidden -> kv dim", bias=BIAS),
        **linear("attn.v", f"{LAYER}.self_attn.v_proj", "hidden -> kv dim", bias=BIAS),
        **linear("attn.o", f"{LAYER}.self_attn.out_proj", "kv dim -> hidden", bias=BIAS),
        **norm("norm.mlp", f"{LAYER}.final_layer_norm", **NORM),
        **linear("mlp.up", f"{LAYER}.fc1", "hidden -> ffn", bias=BIAS),
        **linear("mlp.down", f"{LAYER}.fc2", "ffn -> hidden", bias=BIAS),
        **norm(
            "norm.final",
            f"{DECODER}.final_layer_norm",
            bias=True,
            writes="head",
            unless="_remove_final_layer_norm",
        ),
        "head.weight": TIED_HEAD,
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("word_embed_proj_dim", "hidden"),
        ("ffn_dim", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
        ("max_position_embeddings", "pos"),
        ("_places", "place"),
    ),
    slot=f"{LAYER}.self_attn",
    defaults={
        "word_embed_proj_dim": lambda config: config["hidden_size"],
        "max_position_embeddings": 2048,
        "_places": lambda config: config["max_position_embeddings"] + 2,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "_eps": 1e-5,
        **SWITCHES,
    },
    fixed={"group": 1},
    eps="_eps",
    activation="activation_function",
    rotary=False,
    rewrite=refuse_other_norms,
)
