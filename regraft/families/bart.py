"""BART (arXiv 1910.13461): an encoder and a decoder, with a norm after each sum.

Its relatives (mBART, Pegasus, Marian, M2M-100, Whisper) have most of its names; their tables are
made of the functions here.
"""

from collections.abc import Callable
from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from .bert import architecture

ENCODER, DECODER = "model.encoder", "model.decoder"
ENCODER_LAYER, DECODER_LAYER = f"{ENCODER}.layers.{{}}", f"{DECODER}.layers.{{}}"
SOURCE: dict[str, Any] = {"at": "source"}  # applied to the encoder's row
IN_ENCODER: dict[str, Any] = {"stack": "encoder_depth", **SOURCE}
TABLE: dict[str, Any] = {"stored": "in out"}
SHARED_SIZES = (
    ("vocab_size", "vocab"),
    ("d_model", "hidden"),
    ("d_model", "kv dim"),
    ("encoder_ffn_dim", "ffn"),
    ("decoder_ffn_dim", "ffn"),
    ("encoder_layers", "encoder_depth"),
    ("decoder_layers", "depth"),
    ("encoder_attention_heads", "kv"),
    ("decoder_attention_heads", "kv"),
)
SIZES = (*SHARED_SIZES, ("_positions", "pos"))
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": True,
    "scale_embedding": False,
    "activation_function": "gelu",
    "_eps": 1e-5,  # of nn.LayerNorm
}
CLOSED = {"attention": "mixers read one stack of layers"}
# Two rows before the first position are never read.
OFFSET: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "_positions": lambda config: config["max_position_embeddings"] + 2,
}


def attention_parts(
    role: str, name: str, source: str, reads: str, writes: str, key_bias: bool = True, **fields: Any
) -> dict[str, Part]:
    """Queries, keys, values and output of an attention.

    Args:
        role: the role's start, such as "cross_attn".
        name: the module's name.
        source: what keys and values read, as of `Part.reads`.
        reads: what queries read.
        writes: what the output gives.
        key_bias: whether keys have a bias.
        fields: further fields of all parts.
    """
    # Keys and values of a decoder's attention to its encoder are made once for the encoder's row.
    row = SOURCE if role == "cross_attn" else {}
    keys: dict[str, Any] = fields | {"reads": source} | row
    axes = "hidden -> kv dim"
    return {
        **linear(f"{role}.q", f"{name}.q_proj", axes, bias=True, **fields, reads=reads),
        **linear(f"{role}.k", f"{name}.k_proj", axes, bias=key_bias, **keys),
        **linear(f"{role}.v", f"{name}.v_proj", axes, bias=True, **keys),
        **linear(
            f"{role}.o", f"{name}.out_proj", "kv dim -> hidden", bias=True, **fields, writes=writes
        ),
    }


def layer_parts(stack: str, post_norm: bool = False, key_bias: bool = True) -> dict[str, Part]:
    """The layers of a stack.

    Args:
        stack: "encoder" or "decoder".
        post_norm: whether norms come after the sums, else before attention and MLP.
        key_bias: whether keys have a bias.
    """
    is_encoder = stack == "encoder"
    start, layer = ("encoder.", ENCODER_LAYER) if is_encoder else ("", DECODER_LAYER)
    fields: dict[str, Any] = IN_ENCODER if is_encoder else {}
    reads, writes = ("stream", "branch") if post_norm else ("normed", "stream")
    norms: dict[str, Any] = {"bias": True, **fields}
    norms |= {"reads": "branch", "writes": "stream"} if post_norm else {}

    def place_norm(role: str, name: str) -> dict[str, Part]:
        return norm(f"{start}norm.{role}{'_post' if post_norm else ''}", name, **norms)

    def in_order(*groups: dict[str, Part]) -> dict[str, Part]:
        """A branch and its norm in the order in which they run."""
        first, second = groups if post_norm else groups[::-1]
        return {**first, **second}

    def attention(role: str, name: str, source: str) -> dict[str, Part]:
        return attention_parts(role, name, source, reads, writes, key_bias, **fields)

    own, cross = f"{layer}.self_attn", f"{layer}.encoder_attn"
    parts = in_order(attention(f"{start}attn", own, reads), place_norm("attn", f"{own}_layer_norm"))
    if not is_encoder:
        parts |= in_order(
            attention("cross_attn", cross, reads), place_norm("cross", f"{cross}_layer_norm")
        )
    up: dict[str, Any] = {"bias": True, "reads": reads, **fields}
    down: dict[str, Any] = {"bias": True, "writes": writes, **fields}
    mlp = {
        **linear(f"{start}mlp.up", f"{layer}.fc1", "hidden -> ffn", **up),
        **linear(f"{start}mlp.down", f"{layer}.fc2", "ffn -> hidden", **down),
    }
    return parts | in_order(mlp, place_norm("mlp", f"{layer}.final_layer_norm"))


def embedding_parts(positions: bool = True, normed: bool = False) -> dict[str, Part]:
    """The embedding that both stacks share, and their tables of positions.

    Args:
        positions: whether tables of positions are stored.
        normed: whether their sums are normed.
    """
    table: dict[str, Any] = TABLE | {"writes": "branch" if normed else "stream"}
    stream: dict[str, Any] = {"bias": True, "reads": "branch", "writes": "stream"}
    places = "embed_positions"
    parts = linear("embed", "model.shared", "vocab -> hidden", **table)
    for role, base in (("encoder.", ENCODER), ("", DECODER)) if positions else ():
        parts |= linear(f"{role}pos", f"{base}.{places}", "pos -> hidden", **table)
    for role, base in (("encoder.", ENCODER), ("", DECODER)) if normed else ():
        name = f"{base}.layernorm_embedding"
        parts |= norm(f"{role}norm.embed", name, **stream)
    return parts


def final_norms() -> dict[str, Part]:
    """The norms behind the last layers of both stacks."""
    return {
        **norm("encoder.norm.final", f"{ENCODER}.layer_norm", bias=True),
        **norm("norm.final", f"{DECODER}.layer_norm", bias=True, writes="head"),
    }


def head_parts(reads: str = "head", bias: bool = True) -> dict[str, Part]:
    """The output embedding and the constants that are added to logits.

    Args:
        reads: what it reads.
        bias: whether the class has such constants.
    """
    head = Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings", reads=reads)
    constants = {"head.constant": Part("final_logits_bias", "1 vocab")} if bias else {}
    return {"head.weight": head, **constants}


def check_class(*names: str) -> Callable[[Config], str]:
    """A function for `Anatomy.prefix`, which refuses other classes than those named."""

    def check(config: Config) -> str:
        architecture(config, dict.fromkeys(names, ""))
        return ""

    return check


def keep_tied_hidden(config: Config) -> dict[str, Any]:
    """Nothing further to change; RegraftError when hidden grows under a tied head.

    The head reads the last layer's norm itself: it would add up every copy of the stream, and no
    gain between the two can take that back.
    """
    before = config.get("_before", {}).get("hidden", config["d_model"])
    if config["tie_word_embeddings"] and config["d_model"] != before:
        raise RegraftError(
            f"{config['model_type']} has a head that is tied to its embedding and reads a norm "
            f"after a sum, which keep hidden at {before}: grow --ffn or --layers"
        )
    return {}


anatomy = Anatomy(
    family="bart",
    parts={
        **embedding_parts(normed=True),
        **layer_parts("encoder", post_norm=True),
        **layer_parts("decoder", post_norm=True),
        **head_parts(reads="stream"),
    },
    sizes=SIZES,
    slot=f"{DECODER_LAYER}.self_attn",
    defaults=DEFAULTS | OFFSET,
    fixed={"group": 1},
    eps="_eps",
    rotary=False,
    embed_scale="scale_embedding",
    prefix=check_class("BartForConditionalGeneration"),
    finish=keep_tied_hidden,
    causal=False,
    inputs="token pairs",
    activation="activation_function",
    closed=CLOSED,
)
