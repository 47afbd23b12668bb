"""GPT-Neo (EleutherAI, 2021): GPT-2 with a window in every second layer and unscaled scores."""

from typing import Any

from ..core.anatomy import Anatomy, Config, linear, norm
from ..core.anatomy_defaults import read_aliases
from ..core.part import TIED_HEAD

LAYER = "transformer.h.{}"
ATTENTION = f"{LAYER}.attn.attention"


def list_kinds(config: Config) -> list[str]:
    """The kind of each layer, from a list of [kinds, repetitions]."""
    types = config.get("attention_types")
    if types is None:
        return [("global", "local")[layer % 2] for layer in range(config["num_layers"])]
    return [kind for kinds, times in types for _ in range(times) for kind in kinds]


def list_windows(config: Config) -> list[int | None]:
    """The last tokens that each layer sees, None for all."""
    window = int(config.get("window_size") or 256)
    return [window if kind == "local" else None for kind in list_kinds(config)]


def move_kinds(config: Config) -> dict[str, Any]:
    """The kinds of layers, each once, where layers move or the config has none."""
    order, kinds = config.get("_order"), list_kinds(config)
    if order is None and config.get("attention_types") is not None:
        return {}
    moved = [kinds[layer] for layer in order or range(len(kinds))]
    return {"attention_types": [[moved, 1]], "attention_layers": moved}


anatomy = Anatomy(
    family="gpt_neo",
    parts={
        **linear("embed", "transformer.wte", "vocab -> hidden", stored="in out"),
        **linear("pos", "transformer.wpe", "pos -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.ln_1", bias=True),
        **linear("attn.q", f"{ATTENTION}.q_proj", "hidden -> kv dim"),
        **linear("attn.k", f"{ATTENTION}.k_proj", "hidden -> kv dim"),
        **linear("attn.v", f"{ATTENTION}.v_proj", "hidden -> kv dim"),
        **linear("attn.o", f"{ATTENTION}.out_proj", "kv dim -> hidden", bias=True),
        **norm("norm.mlp", f"{LAYER}.ln_2", bias=True),
        **linear("mlp.up", f"{LAYER}.mlp.c_fc", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.mlp.c_proj", "ffn -> hidden", bias=True),
        **norm("norm.final", "transformer.ln_f", bias=True, writes="head"),
        "head.weight": TIED_HEAD,
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("num_layers", "depth"),
        ("num_heads", "kv"),
        ("max_position_embeddings", "pos"),
    ),
    slot=ATTENTION,
    defaults={
        "intermediate_size": lambda config: 4 * config["hidden_size"],
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
    },
    fixed={"group": 1},
    ignored={
        r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)": "buffer: the causal mask"
    },
    rewrite=read_aliases({"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}),
    finish=move_kinds,
    eps="layer_norm_epsilon",
    activation="activation_function",
    rotary=False,
    scale=lambda config, dim, layer: 1.0,
    windows=list_windows,
)
