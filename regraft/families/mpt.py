"""MPT (MosaicML, 2023): layer norms without biases, and ALiBi (arXiv 2108.12409).

The MLP is four times as wide as the stream and the slopes of ALiBi are the usual ones, whatever the
config says.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, linear, norm
from ..core.anatomy_defaults import read_aliases
from ..core.part import TIED_HEAD
from ..errors import RegraftError
from .gpt2 import QKV

LAYER = "transformer.blocks.{}"


def attention_key(config: Config, key: str) -> Any:
    """What the config of the attention says, None where it does not."""
    return (config.get("attn_config") or {}).get(key)


def softmax_scale(config: Config, dim: int, layer: int) -> float:
    """The config's own factor on the scores, else one over the root of the head size."""
    return float(attention_key(config, "softmax_scale") or dim**-0.5)


def check_clip(config: Config) -> dict[str, Any]:
    """Refuse wider heads where queries, keys and values are clipped; gives no config keys."""
    clip = attention_key(config, "clip_qkv")
    before = config.get("_before", {}).get("dim", 0)
    if clip is not None and config["d_model"] != before * config["n_heads"]:
        raise RegraftError(
            f"clip_qkv = {clip:g} cuts keys, which wider heads scale: keep --head-dim {before}"
        )
    return {}


anatomy = Anatomy(
    family="mpt",
    parts={
        **linear("embed", "transformer.wte", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.norm_1", centered=True),
        **linear("attn.qkv", f"{LAYER}.attn.Wqkv", "hidden -> kv dim + kv dim + kv dim", fused=QKV),
        **linear("attn.o", f"{LAYER}.attn.out_proj", "kv dim -> hidden"),
        **norm("norm.mlp", f"{LAYER}.norm_2", centered=True),
        **linear("mlp.up", f"{LAYER}.ffn.up_proj", "hidden -> ffn"),
        **linear("mlp.down", f"{LAYER}.ffn.down_proj", "ffn -> hidden"),
        **norm("norm.final", "transformer.norm_f", centered=True, writes="head"),
        "head.weight": TIED_HEAD,
    },
    sizes=(
        ("vocab_size", "vocab"),
        ("d_model", "hidden"),
        ("d_model", "kv dim"),
        ("_ffn", "ffn"),
        ("n_layers", "depth"),
        ("n_heads", "kv"),
    ),
    slot=f"{LAYER}.attn",
    defaults={
        "_ffn": lambda config: 4 * config["d_model"],
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "_activation": "gelu",
    },
    fixed={"group": 1},
    rewrite=read_aliases(
        {
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
        }
    ),
    eps="layer_norm_epsilon",
    activation="_activation",
    rotary=False,
    finish=check_clip,
    alibi=lambda config: 8.0,
    clip=lambda config: attention_key(config, "clip_qkv") or None,
    scale=softmax_scale,
    ffn_ratio=4,
)
