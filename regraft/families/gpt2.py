"""GPT-2 (Radford et al., 2019): learned positions; queries, keys and values are stacked.

Matrices are stored input first (Conv1D).
"""

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..core.anatomy_defaults import read_aliases

LAYER = "transformer.h.{}"
QKV = ("attn.q", "attn.k", "attn.v")


def softmax_scale(config: Config, dim: int, layer: int) -> float:
    """One over the root of the head dim and over the layer, each if the config says so."""
    plain = dim**-0.5 if config["scale_attn_weights"] else 1.0
    return plain / (layer + 1) if config["scale_attn_by_inverse_layer_idx"] else plain


anatomy = Anatomy(
    family="gpt2",
    parts={
        **linear("embed", "transformer.wte", "vocab -> hidden", stored="in out"),
        **linear("pos", "transformer.wpe", "pos -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.ln_1", bias=True),
        **linear(
            "attn.qkv",
            f"{LAYER}.attn.c_attn",
            "hidden -> kv dim + kv dim + kv dim",
            bias=True,
            stored="in out",
            fused=QKV,
        ),
        **linear("attn.o", f"{LAYER}.attn.c_proj", "kv dim -> hidden", bias=True, stored="in out"),
        **norm("norm.mlp", f"{LAYER}.ln_2", bias=True),
        **linear("mlp.up", f"{LAYER}.mlp.c_fc", "hidden -> ffn", bias=True, stored="in out"),
        **linear("mlp.down", f"{LAYER}.mlp.c_proj", "ffn -> hidden", bias=True, stored="in out"),
        **norm("norm.final", "transformer.ln_f", bias=True, writes="head"),
        "head.weight": Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings"),
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("n_embd", "hidden"),
        ("n_embd", "kv dim"),
        ("n_inner", "ffn"),
        ("n_layer", "depth"),
        ("n_head", "kv"),
        ("n_positions", "pos"),
    ),
    slot=f"{LAYER}.attn",
    defaults={
        "n_inner": lambda config: 4 * config["n_embd"],
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    fixed={"group": 1},
    ignored={r"(transformer\.)?h\.\d+\.attn\.masked_bias": "buffer: the causal mask"},
    rewrite=read_aliases(
        {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        }
    ),
    eps="layer_norm_epsilon",
    activation="activation_function",
    rotary=False,
    scale=softmax_scale,
)
