"""T5 (arXiv 1910.10683): an encoder and a decoder without biases; attention adds a learned number
for every distance, of which the first layer of each stack has the table.

Scores are not scaled. Version 1.1 (arXiv 2002.05202) has gated MLPs.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from .bart import CLOSED, IN_ENCODER, SOURCE, TABLE, check_class


def is_scaled(config: Config) -> bool:
    """Whether what the head reads is divided by the root of hidden: not in version 1.1."""
    stated = config.get("scale_decoder_outputs")
    return config.get("tie_word_embeddings") is not False if stated is None else bool(stated)


def is_gated(config: Config) -> bool:
    """Whether MLPs have a gate."""
    return str(config["feed_forward_proj"]).startswith("gated-")


def attention_parts(role: str, name: str, **fields: Any) -> dict[str, Part]:
    """Queries, keys, values and output of an attention."""
    row = SOURCE if role == "cross_attn" else {}  # keys and values read the encoder's row
    axes = "hidden -> kv dim"
    return {
        **linear(f"{role}.q", f"{name}.q", axes, **fields),
        **linear(f"{role}.k", f"{name}.k", axes, **fields | row),
        **linear(f"{role}.v", f"{name}.v", axes, **fields | row),
        **linear(f"{role}.o", f"{name}.o", "kv dim -> hidden", **fields),
    }


def stack_parts(stack: str, bias_in_layers: bool = False) -> dict[str, Part]:
    """The layers of a stack, its table of distances and its last norm.

    Args:
        stack: "encoder" or "decoder".
        bias_in_layers: whether every layer has a table of distances, else the first alone.
    """
    is_encoder = stack == "encoder"
    start = "encoder." if is_encoder else ""
    fields: dict[str, Any] = IN_ENCODER if is_encoder else {}
    layer, first = f"{stack}.block.{{}}.layer", f"{stack}.block.0.layer"
    own, mlp = f"{layer}.0", f"{layer}.1" if is_encoder else f"{layer}.2"
    distances = f"{layer if bias_in_layers else first}.0.SelfAttention.relative_attention_bias"
    cross = (
        {}
        if is_encoder
        else {
            **norm("norm.cross", f"{layer}.1.layer_norm"),
            **attention_parts("cross_attn", f"{layer}.1.EncDecAttention"),
        }
    )
    dense = f"{mlp}.DenseReluDense"
    return {
        **linear(f"{start}distance", distances, "bucket -> kv", **TABLE | fields),
        **norm(f"{start}norm.attn", f"{own}.layer_norm", **fields),
        **attention_parts(f"{start}attn", f"{own}.SelfAttention", **fields),
        **cross,
        **norm(f"{start}norm.mlp", f"{mlp}.layer_norm", **fields),
        **linear(f"{start}mlp.gate", f"{dense}.wi_0", "hidden -> ffn", when="_gated", **fields),
        **linear(f"{start}mlp.up", f"{dense}.wi_1", "hidden -> ffn", when="_gated", **fields),
        **linear(f"{start}mlp.one.up", f"{dense}.wi", "hidden -> ffn", unless="_gated", **fields),
        **linear(f"{start}mlp.down", f"{dense}.wo", "ffn -> hidden", **fields),
        **norm(
            f"{start}norm.final",
            f"{stack}.final_layer_norm",
            writes="normed" if is_encoder else "head",
        ),
    }


def t5_parts(bias_in_layers: bool = False) -> dict[str, Part]:
    """The parts of a T5; arguments as of `stack_parts`."""
    return {
        **linear("embed", "shared", "vocab -> hidden", **TABLE),
        **stack_parts("encoder", bias_in_layers),
        **stack_parts("decoder", bias_in_layers),
    }


anatomy = Anatomy(
    family="t5",
    parts=t5_parts(),
    sizes=(
        ("vocab_size", "vocab"),
        ("d_model", "hidden"),
        ("d_ff", "ffn"),
        ("num_layers", "encoder_depth"),
        ("num_decoder_layers", "depth"),
        ("num_heads", "kv"),
        ("d_kv", "dim"),
        ("relative_attention_num_buckets", "bucket"),
    ),
    slot="decoder.block.{}.layer.0.SelfAttention",
    defaults={
        "num_decoder_layers": lambda config: config["num_layers"],
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "_gated": is_gated,
        "_scaled": is_scaled,
        "tie_word_embeddings": True,
    },
    fixed={"group": 1},
    eps="layer_norm_epsilon",
    rotary=False,
    scale=lambda config, dim, layer: 1.0,
    head_scale="_scaled",
    prefix=check_class("T5ForConditionalGeneration"),
    causal=False,
    inputs="token pairs",
    activation="feed_forward_proj",
    closed=CLOSED,
)
