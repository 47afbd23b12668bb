"""What a table says of the attention in one layer, for mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from .part import Config

if TYPE_CHECKING:
    from .anatomy import Anatomy


QUERY_NORM = ("attn.q_norm.weight", "attn.q_norm.bias")  # roles
LATENT = "attn.kv_b.weight"  # role of the map from the latent to keys and values


class AttentionFields(TypedDict):
    """The attention of one layer: the fields of `mixers.attention.Attention`, as in config.json."""

    hidden: int  # size of the residual stream
    kv: int  # number of key/value heads
    group: int  # query heads per key/value head
    dim: int  # size of a head
    scale: float  # factor on the logits
    qkv_bias: bool  # whether queries, keys and values have a bias
    o_bias: bool  # whether the output projection has a bias
    qk_norm: float | None  # epsilon of the norm on queries and keys; None: there is none
    rotary: bool  # whether queries and keys are rotated by position
    # Whether neighbouring coordinates turn together (`Anatomy.rotary_pairs`), and how the tables of
    # cos and sin are laid out (`Anatomy.rotary_tables`), where it is not the usual.
    rotary_pairs: NotRequired[bool]
    rotary_tables: NotRequired[str]
    # What the norm on queries normalizes, as a signature: left out for "gain dim", else "1+gain
    # dim" or "gain kv group dim", all heads together.
    qk_norm_form: NotRequired[str]
    qk_norm_centered: NotRequired[bool]  # whether it subtracts the mean of a head
    qk_norm_bias: NotRequired[bool]  # whether it adds a bias
    norms_rotated: NotRequired[bool]  # whether the norm comes after the rotation
    gated: NotRequired[bool]  # whether a sigmoid of the layer's input multiplies heads' outputs
    sinks: NotRequired[bool]  # whether every head has a learned logit beside its scores
    # c in c tanh(logits / c); left out where there is no cap. Null: the mixer leaves out the one
    # that the source has.
    softcap: NotRequired[float | None]
    # Latent attention, as of `mixers.attention.Attention`; left out for any other.
    latent: NotRequired[int]
    query_latent: NotRequired[int]
    rope: NotRequired[int]
    value: NotRequired[int]
    latent_eps: NotRequired[float]
    alibi: NotRequired[float]  # exponent of the last slope of ALiBi; left out without
    clip: NotRequired[float]  # limit of queries, keys and values; left out where there is none


def has_softmax(anatomy: Anatomy, config: Config, layer: int) -> bool:
    """Whether a layer has softmax attention; in hybrids, some layers have a state instead.

    Args:
        anatomy: the table of a stock family.
        config: of the model.
        layer: number of the layer.
    """
    queries = [
        part
        for role, part in anatomy.parts.items()
        if role in ("attn.q.weight", LATENT)
        or (role.endswith(".weight") and "attn.q" in part.fused)
    ]
    full = anatomy.fill_defaults(config)
    return not queries or any(part.is_in_layer(full, layer) for part in queries)


def describe_attention(anatomy: Anatomy, config: Config, layer: int) -> AttentionFields:
    """The attention of a layer, as arguments of `mixers.attention.Attention`.

    Args:
        anatomy: the table of a stock family.
        config: of the model.
        layer: number of the layer.
    """
    full, sizes = anatomy.fill_defaults(config), anatomy.solve(config)
    roles = {role for role, part in anatomy.parts.items() if part.is_present(full)}
    # Fused parts stand for the roles packed into them: "attn.qkv.bias" for "attn.q.bias".
    roles |= {
        f"{name}.{role.rpartition('.')[2]}" for role in roles for name in anatomy.parts[role].fused
    }
    fields: AttentionFields = {
        "hidden": sizes["hidden"],
        "kv": sizes["kv"],
        "group": sizes["group"],
        "dim": sizes["dim"],
        "scale": anatomy.scale(full, sizes["dim"], layer),
        "qkv_bias": "attn.q.bias" in roles,
        "o_bias": "attn.o.bias" in roles,
        "qk_norm": float(full[anatomy.eps]) if "attn.q_norm.weight" in roles else None,
        "rotary": anatomy.rotary and anatomy.rotates(full, layer),
    }
    if fields["rotary"] and anatomy.rotary_pairs:
        fields["rotary_pairs"] = True
    if fields["rotary"] and anatomy.rotary_tables != "halves":
        fields["rotary_tables"] = anatomy.rotary_tables
    form = anatomy.parts["attn.q_norm.weight"].signature if fields["qk_norm"] is not None else ""
    if form not in ("", "gain dim"):
        fields["qk_norm_form"] = form
    if form and any(anatomy.parts[role].subtracts_mean for role in roles & {*QUERY_NORM}):
        fields["qk_norm_centered"] = True
    if form and QUERY_NORM[1] in roles:
        fields["qk_norm_bias"] = True
    if form and anatomy.norms_rotated:
        fields["norms_rotated"] = True
    if "attn.gate.weight" in roles:
        fields["gated"] = True
    if "attn.sinks.weight" in roles:
        fields["sinks"] = True
    if LATENT in roles:
        fields["qkv_bias"] = "attn.kv_a.bias" in roles
        fields["latent"], fields["value"] = sizes["latent"], sizes["value"]
        fields["rope"] = sizes["rope"]
        if "attn.q_b.weight" in roles:
            fields["query_latent"] = sizes["query_latent"]
        fields["latent_eps"] = float(anatomy.latent_eps or full[anatomy.eps])
    cap = config.get(*anatomy.softcap) if anatomy.softcap else None
    if cap is not None:
        fields["softcap"] = float(cap)
    if anatomy.alibi is not None:
        fields["alibi"] = anatomy.alibi(full)
    clip = anatomy.clip(full)
    if clip is not None:
        fields["clip"] = float(clip)
    return fields
