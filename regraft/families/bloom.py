"""BLOOM (arXiv 2211.05100): ALiBi (arXiv 2108.12409), and a norm behind the embedding.

The MLP is four times as wide as the stream.
"""

from ..core.anatomy import Anatomy, linear, norm
from ..core.anatomy_defaults import read_aliases
from ..core.part import TIED_HEAD
from .gpt_neox import QKV

LAYER = "transformer.h.{}"

anatomy = Anatomy(
    family="bloom",
    parts={
        **linear(
            "embed", "transformer.word_embeddings", "vocab -> hidden", stored="in out",
            writes="branch",
        ),
        **norm(
            "norm.embed", "transformer.word_embeddings_layernorm", bias=True, reads="branch",
            writes="stream",
        ),
        **norm("norm.attn", f"{LAYER}.input_layernorm", bias=True),
        **linear(
            "attn.qkv", f"{LAYER}.self_attention.query_key_value", "hidden -> kv three dim",
            bias=True, fused=QKV,
        ),
        **linear("attn.o", f"{LAYER}.self_attention.dense", "kv dim -> hidden", bias=True),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", bias=True),
        **linear("mlp.up", f"{LAYER}.mlp.dense_h_to_4h", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.mlp.dense_4h_to_h", "ffn -> hidden", bias=True),
        **norm("norm.final", "transformer.ln_f", bias=True, writes="head"),
        "head.weight": TIED_HEAD,
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("_ffn", "ffn"),
        ("n_layer", "depth"),
        ("n_head", "kv"),
    ),
    slot=f"{LAYER}.self_attention",
    defaults={
        "_ffn": lambda config: 4 * config["hidden_size"],
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "_activation": "gelu",
    },
    fixed={"group": 1},
    rewrite=read_aliases({"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}),
    eps="layer_norm_epsilon",
    activation="_activation",
    rotary=False,
    alibi=lambda config: 8.0,
    ffn_ratio=4,
)  # fmt: skip
