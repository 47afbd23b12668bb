"""GPT-NeoX (arXiv 2204.06745): attention and MLP in parallel, partial rotary positions.

Queries, keys and values are interleaved head by head in one matrix.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm, older_rope_keys

LAYER = "gpt_neox.layers.{}"
QKV = ("attn.q", "attn.k", "attn.v")


def older_config_keys(config: Config) -> dict[str, Any]:
    """Older classes have other keys for theta and for the share of a head that is rotated."""
    keys = older_rope_keys(config)
    if "rope_theta" in keys:
        keys |= {
            "rotary_emb_base": keys["rope_theta"],
            "rotary_pct": keys.get("partial_rotary_factor", 1.0),
        }
    return keys


anatomy = Anatomy(
    family="gpt_neox",
    parts={
        **linear("embed", "gpt_neox.embed_in", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm", bias=True),
        **linear(
            "attn.qkv",
            f"{LAYER}.attention.query_key_value",
            "hidden -> kv three dim",
            bias="attention_bias",
            fused=QKV,
        ),
        **linear("attn.o", f"{LAYER}.attention.dense", "kv dim -> hidden", bias="attention_bias"),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", bias=True),
        **linear("mlp.up", f"{LAYER}.mlp.dense_h_to_4h", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.mlp.dense_4h_to_h", "ffn -> hidden", bias=True),
        **norm("norm.final", "gpt_neox.final_layer_norm", bias=True, writes="head"),
        "head.weight": Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings"),
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("hidden_size", "kv dim"),
        ("intermediate_size", "ffn"),
        ("num_hidden_layers", "depth"),
        ("num_attention_heads", "kv"),
    ),
    slot=f"{LAYER}.attention",
    defaults={
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "_rotary_share": {"rotary_pct": 0.25},
    },
    fixed={"group": 1},
    filed={"lm_head.": "embed_out."},
    older=older_config_keys,
    eps="layer_norm_eps",
    not_null=("classifier_dropout",),
    bridge=lambda config: "phi" if config["use_parallel_residual"] else "starcoder2",
)
