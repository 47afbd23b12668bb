"""GraniteMoeHybridForCausalLM without experts: Llama-shaped, each layer full or Mamba-2.

A Mamba-2 layer of the class is the mixer `mamba2` with one norm for each group of B and C: all
heads share both in layout `own`, each head has its own in layout `attention` with the option
`norm` "head". There the layers are padded to twice the hidden size, which some engines require,
with heads that are zero: each has a norm of its own, so they change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.anatomy import Config, Key, PlacedPart, find_anatomy
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.stock_config import read_stock_config
from ...families.granitemoehybrid import anatomy as granite
from ...mixers.attention import Attention
from ...mixers.mamba2 import Mamba2, Mamba2Options
from ...mixers.source_windows import source_windows
from ..conversion import (
    build_checkpoint,
    carry_keys,
    find_own,
    find_unread_keys,
    has_mlp_biases,
    mixers_of,
    name_mixer,
)
from ..llama_shape import find_differences
from ..target import ExportTarget, name_engines

FULL, LINEAR = "full_attention", "linear_attention"
OTHER = (
    "the class has layers that see everything and Mamba-2 layers, in which SiLU acts on queries,"
    " keys and values, nothing is rotated, and a norm stands in the place of a denominator:"
    " linearize with --for granite_hybrid"
)
# The layer's vectors, by their role in the class.
VECTORS = {"dt_bias": "dt.bias", "A_log": "A_log", "D": "D", "norm.weight": "norm"}
# The maps and convolutions of B, C and x in the mixer, by layout.
LOCAL = {
    "own": {"x": "x", "b": "b", "c": "c"},
    "attention": {"x": "v_proj", "b": "k_proj", "c": "q_proj"},
}


def find_misfits(config: Config) -> list[str]:
    """What the class cannot hold; nothing when it holds the model."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    if host.family == granite.family:
        return ["it is one already: --to hf writes it as it is"]
    if found := find_differences(host_config, host):
        return found
    if has_mlp_biases(config):
        return ["its MLP has biases (mlp_bias), which the class has not"]
    return find_layer_misfits(config) + find_unread_keys(host_config)


def find_layer_misfits(config: Config) -> list[str]:
    """The first layer that is neither full nor a Mamba-2 layer of the class's kind."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    specs = mixers_of(config)
    for layer, (spec, width) in enumerate(zip(specs, source_windows(host_config), strict=True)):
        if spec is None and width is not None:
            return [
                f"layer {layer} sees {width} tokens, the class has no windows: export it to"
                " granite_swa, or replace that layer with --keep"
            ]
        if spec and spec["name"] != Mamba2.name:
            return [f"layer {layer} has the mixer {name_mixer(spec)}, {OTHER}"]

    made = [spec for spec in specs if spec]
    if not made:
        return []
    if len(made) == len(specs):
        return [
            "no layer is full, and the class generates with a cache only where one is: linearize"
            " with --keep and one layer at least, such as --keep 0"
        ]
    if any(spec != made[0] for spec in made):
        return ["its mamba2 layers differ in their options, the class has one size for all"]
    return find_mamba_misfits(config, made[0], read_stock_config(host_config, host).rms_norm_eps)


def find_mamba_misfits(config: Config, spec: dict[str, Any], eps: float) -> list[str]:
    """What of the mixer's options the class does not compute."""
    options, attention = Mamba2.parse(spec), attention_of(config)
    widths = Mamba2.widths_of(attention, options)
    found = []
    if options.layout == "own" and options.norm == "head" and widths.heads > 1:
        found.append(
            "heads share B and C in layout own, for which the class has one norm:"
            ' linearize with --options \'{"norm": "all"}\''
        )
    if options.layout == "attention" and options.norm == "all" and widths.heads > 1:
        found.append(
            "heads have B and C of their own in layout attention, for which the class has a norm"
            " per head: linearize with --for granite_hybrid"
        )
    if options.eps != eps:
        found.append(
            f"the norm of the mixer adds {options.eps:g}, the class the same in all norms"
            f" (rms_norm_eps {eps:g}): linearize with --for granite_hybrid"
        )
    if attention.qk_norm is not None:
        found.append("the mixer has norms of queries and keys, which the class has not")
    if options.layout == "attention" and 2 * attention.hidden % widths.dim:
        found.append(
            f"heads of {widths.dim} channels do not fill twice the hidden size"
            f" ({2 * attention.hidden}), as the class requires: grow --hidden to a multiple of"
            f" {widths.dim} first"
        )
    return found


def attention_of(config: Config) -> Attention:
    """The attention that the model's mixers replace."""
    return Attention(**next(one for one in config["attention"] if one))


def mamba_keys(config: Config) -> dict[str, Any]:
    """Config keys of the Mamba-2 layers; of layers as wide as the stream where there are none."""
    anatomy = find_anatomy(config)
    hidden = anatomy.solve(config)["hidden"]
    spec = next((spec for spec in mixers_of(config) if spec), None)
    if spec is None:
        shape = {"n_heads": 1, "d_head": 2 * hidden, "n_groups": 1, "d_state": 1, "d_conv": 4}
        return {f"mamba_{key}": value for key, value in shape.items()} | {
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        }

    options, attention = Mamba2.parse(spec), attention_of(config)
    widths, own = Mamba2.widths_of(attention, options), options.layout == "own"
    # The first multiple of the hidden size, from two on, that holds all heads.
    expand = options.expand if own else max(2, -(-widths.inner // hidden))
    while expand * hidden % widths.dim:
        expand += 1
    heads = expand * hidden // widths.dim
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": widths.dim,
        "mamba_n_groups": 1 if own else heads,
        "mamba_d_state": widths.state,
        "mamba_d_conv": options.conv,
        "mamba_expand": expand,
        "mamba_conv_bias": True,
        "mamba_proj_bias": not own and (attention.qkv_bias or attention.o_bias),
    }


def build_config(config: Config) -> dict[str, Any]:
    """config.json in the class's words."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    stock, roles = read_stock_config(host_config, host), host.attention(host_config, 0)
    return {
        **carry_keys(config, granite, "GraniteMoeHybridForCausalLM"),
        "shared_intermediate_size": stock.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_bias": roles["qkv_bias"] or roles["o_bias"],
        "position_embedding_type": "rope",
        "attention_multiplier": roles["scale"],
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "layer_types": [LINEAR if spec else FULL for spec in mixers_of(config)],
        **mamba_keys(config),
    }


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model as one of the class."""
    config = build_config(checkpoint.config)
    return build_checkpoint(
        checkpoint, config, granite, lambda key, part: build_tensor(checkpoint, config, key, part)
    )


def build_tensor(
    checkpoint: Checkpoint, config: Config, key: Key, placed: PlacedPart
) -> LazyTensor:
    """One tensor of the class: the model's own, several of them, or zeros."""
    role, layer = key
    dtype = checkpoint.tensors["norm.final.weight", None].dtype
    pieces = list_pieces(checkpoint, config, role, layer)
    if pieces is None:
        own = find_own(checkpoint, role, layer)
        pieces = [(own, placed.shape)]
    names = tuple(name for own, _ in pieces if own for name in own.provenance.sources)
    kind = "copied" if names else "zero"

    def read() -> Tensor:
        blocks = [fill_block(own, shape, dtype) for own, shape in pieces]
        return torch.cat(blocks).view(placed.shape)

    dtype = next((own.dtype for own, _ in pieces if own), dtype)
    return LazyTensor(placed.shape, dtype, Provenance(kind, names, ""), read)


def list_pieces(
    checkpoint: Checkpoint, config: Config, role: str, layer: int | None
) -> list[tuple[LazyTensor | None, tuple[int, ...]]] | None:
    """(tensor of the model or None for zeros, shape that it takes), from top to bottom, of what the
    class keeps in one tensor; None for a role that the model has as it is.
    """
    if role == "mlp.gate_up.weight":
        pair = [checkpoint[f"mlp.{name}.weight", layer] for name in ("gate", "up")]
        return [(one, one.shape) for one in pair]
    if not role.startswith("mamba."):
        return None

    def own(name: str) -> LazyTensor | None:
        return checkpoint.tensors.get((f"mixer.{name}", layer))

    sizes, spec = granite.solve(config), mixers_of(checkpoint.config)[layer or 0]
    assert spec is not None
    names = LOCAL[spec.get("layout", Mamba2Options.layout)]
    inner = sizes["ssm_head"] * sizes["ssm_dim"]
    keys, hidden = sizes["ssm_group"] * sizes["ssm_state"], sizes["hidden"]
    _, part, *kind = role.split(".")
    if part == "in":
        ending = kind[0]
        rows = {"gate": inner, names["x"]: inner, names["b"]: keys, names["c"]: keys}
        maps = [(own(f"{name}.{ending}"), count) for name, count in rows.items()]
        # The bias of the steps is a vector of its own.
        maps.append((own("dt.weight") if ending == "weight" else None, sizes["ssm_head"]))
        return [(one, (count, hidden) if ending == "weight" else (count,)) for one, count in maps]
    if part == "conv":
        wide = (sizes["tap"],) if kind[0] == "weight" else ()
        counts = {"x": inner, "b": keys, "c": keys}
        return [(own(f"conv_{name}.{kind[0]}"), (n, *wide)) for name, n in counts.items()]
    if part == "o":
        shape = (hidden, inner) if kind[0] == "weight" else (hidden,)
        return [(own(f"o_proj.{kind[0]}"), shape)]
    local = VECTORS[role.removeprefix("mamba.")]
    return [(own(local), (inner if local == "norm" else sizes["ssm_head"],))]


def fill_block(own: LazyTensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor at the start of a block of zeros: what the block has more is of dead heads."""
    if own is None:
        return torch.zeros(shape, dtype=dtype)
    value = own.read()
    if value.ndim > len(shape):  # a convolution by head
        value = value.flatten(0, value.ndim - len(shape))
    elif value.ndim < len(shape):
        value = value.view(*value.shape, *shape[value.ndim :])
    block = torch.zeros(shape, dtype=value.dtype)
    block[tuple(slice(size) for size in value.shape)] = value
    return block


target = ExportTarget(
    name="granite_hybrid",
    loads="GraniteMoeHybridForCausalLM of transformers",
    engines=name_engines(
        "GraniteMoeHybridForCausalLM", ", where the heads are together as wide as `hidden_size`"
    ),
    find_misfits=find_misfits,
    convert=convert,
    build_config=build_config,
    remix={
        "mixer": "mamba2",
        "window": 0,
        "options": {"layout": "attention", "norm": "head", "start": "identity", "eps": "source"},
    },
    method="aligned",
)
