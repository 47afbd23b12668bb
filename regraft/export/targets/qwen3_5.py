"""Qwen3_5ForCausalLM: each layer softmax attention with norms on queries and keys, or gated delta.

The class's layers with the gated delta rule are the mixer `gated_deltanet` with the options
`OPTIONS`. Its softmax attention is Qwen3's with a sigmoid gate per output, which is shut out: a
gate of zero weights is one half, and the output projection is doubled. A Llama's attention has no
norm on queries and keys. Its heads get coordinates of a large constant, so that the norm divides by
a constant, which the gains give back; they take the constant out again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...core.anatomy import Config, Key, PlacedPart, find_anatomy
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.stock_config import read_stock_config
from ...families.qwen3 import anatomy as qwen3
from ...families.qwen3_5_text import FULL, LINEAR
from ...families.qwen3_5_text import anatomy as qwen3_5
from ...mixers.attention import Attention
from ...mixers.gated_deltanet import DeltaOptions, GatedDeltaNet
from ..conversion import (
    build_checkpoint,
    carry_keys,
    copy_tensor,
    find_own,
    find_unread_keys,
    has_mlp_biases,
    mixers_of,
    windows_of,
)
from ..llama_shape import find_differences
from ..target import ExportTarget, name_engines

# Of `gated_deltanet`, as the class computes. Any `conv` of 1 or more and both values of `grouped`
# are held too.
OPTIONS: dict[str, Any] = {
    "grouped": False,
    "rotary": False,
    "activation": "silu",
    "norm": True,
    "gate": True,
    "conv": 4,
    "scale": True,
    "biases": False,
    "qk_norm": False,
    "beta_bias": False,
    "eps": "source",
    "length_eps": 1e-6,
}
HINT = "linearize with --for qwen3_5"
QK_NORMS = ("attn.q_norm.weight", "attn.k_norm.weight")
MULTIPLE = 16  # of a widened head's width, as kernels have it
CONSTANT = 2.0**14  # float16 holds it; a head's queries and keys are at most some hundreds long


@dataclass(frozen=True)
class WideHeads:
    """Softmax heads as the class has them, and what takes its norm away.

    Attributes:
        heads, kv, dim: of the source's attention.
        width: of a head in the class.
        constant: bias of the coordinates behind `dim`; 0: there are none.
        q_gain, k_gain: gains minus one of the first `dim` coordinates; the others have -1.
    """

    heads: int
    kv: int
    dim: int
    width: int
    constant: float = 0.0
    q_gain: float = 0.0
    k_gain: float = 0.0


def find_misfits(config: Config) -> list[str]:
    """What the class cannot hold; nothing when it holds the model."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    if host.family == qwen3_5.family:
        return ["it is one already: --to hf writes it as it is"]
    norms = {role: qwen3.parts[role] for role in QK_NORMS}
    if found := find_differences(host_config, host, norms):
        return found
    if has_mlp_biases(config):
        return ["its MLP has biases, the class's has none"]
    found = find_mixer_misfits(config) or find_kept_misfits(config)
    return found or find_unread_keys(host_config)


def find_mixer_misfits(config: Config) -> list[str]:
    """The first layer that is neither softmax attention nor the class's gated delta rule."""
    anatomy = find_anatomy(config)
    host = anatomy.host(config)
    eps = float(host.fill_defaults(anatomy.host_config(config))[host.eps])
    taps = set()
    for layer, spec in enumerate(mixers_of(config)):
        if spec is None:
            continue
        if spec["name"] == "gated":
            inner = spec["linear"]["name"]
            return [
                f"layer {layer} has {inner} beside a window, the class one of the two: {HINT}, or"
                " with --window 0"
            ]
        if spec["name"] != GatedDeltaNet.name:
            return [f"layer {layer} has the mixer {spec['name']}: {HINT}"]
        options, attention = GatedDeltaNet.parse(spec), Attention(**config["attention"][layer])
        if wrong := find_wrong_option(options, attention, eps):
            name, wanted = wrong
            return [
                f"gated_deltanet of layer {layer} has {name} {getattr(options, name)}, the class"
                f" {wanted}: {HINT}"
            ]
        taps.add(options.conv)
    if len(taps) > 1:
        return [f"layers have convolutions of {sorted(taps)} taps, the class has one length"]
    return []


def find_wrong_option(
    options: DeltaOptions, attention: Attention, eps: float
) -> tuple[str, Any] | None:
    """(name, the class's value) of an option that is not as the class computes; None: all are."""
    # What the source does not have cannot differ.
    free = {"grouped", "conv"}
    free |= set() if attention.rotary else {"rotary"}
    free |= set() if attention.qkv_bias or attention.o_bias else {"biases"}
    free |= set() if attention.qk_norm is not None else {"qk_norm"}
    for name, wanted in (OPTIONS | {"eps": eps}).items():
        if name not in free and getattr(options, name) != wanted:
            return name, wanted
    return ("conv", "1 or more") if options.conv < 1 else None


def find_kept_misfits(config: Config) -> list[str]:
    """Kept softmax layers that do not see all tokens, or none."""
    if all(mixers_of(config)):
        return [
            "no layer has softmax attention, and the class's cache counts tokens in one, as"
            " llama.cpp's does: keep one, such as --keep 0"
        ]
    for layer, (spec, window) in enumerate(zip(mixers_of(config), windows_of(config), strict=True)):
        if spec is None and window is not None:
            return [
                f"layer {layer} has attention over the last {window} tokens, the class's sees all:"
                f" {HINT} --keep none, or keep only layers that see all"
            ]
    return []


def build_config(config: Config) -> dict[str, Any]:
    """config.json in the class's words."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    stock, specs = read_stock_config(host_config, host), mixers_of(config)
    attention = host.attention(host_config, 0)
    wide = widen_heads(Attention(**attention))
    heads = attention["kv"] * attention["group"]
    biases = bool(attention["qkv_bias"] or attention["o_bias"] or wide.constant)
    taps = [GatedDeltaNet.parse(spec).conv for spec in specs if spec]
    return {
        **carry_keys(config, qwen3_5, "Qwen3_5ForCausalLM"),
        "rope_parameters": build_rope(stock.rope_parameters, wide),
        "head_dim": wide.width,
        "attention_bias": biases,
        "qkv_bias": biases,  # the same for vLLM (0.32), which reads this key alone
        "layer_types": [LINEAR if spec else FULL for spec in specs],
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": attention["dim"],
        "linear_value_head_dim": attention["dim"],
        "linear_conv_kernel_dim": taps[0] if taps else OPTIONS["conv"],
    }


def build_rope(rope: Mapping[str, Any], wide: WideHeads) -> dict[str, Any]:
    """Rotary positions of the first `dim` coordinates of a head.

    The class has three positions a token, for images; those of text are equal, whatever share of
    the frequencies each has. Readers with a fourth, such as llama.cpp's, want these shares.
    """
    half = wide.dim // 2
    share = wide.dim / wide.width
    if int(wide.width * share) < wide.dim:  # transformers rounds the product down
        share = math.nextafter(share, 1)
    return dict(rope) | {
        "partial_rotary_factor": share,
        "mrope_section": [(half + 2) // 3, (half + 1) // 3, half // 3],
        "mrope_interleaved": True,
    }


@cache
def widen_heads(attention: Attention) -> WideHeads:
    """How the class holds a source's softmax heads.

    Behind the norm a coordinate x of width d is x (1 + gain) / c, with c^2 = n constant^2 / width
    for n constants, beside which the source's own squares do not count. So constant and gains are
    chosen such that products of queries and keys, times width^-0.5, are the source's: numbers that
    bfloat16 and float16 hold, whose product comes nearest.
    """
    heads, kv, dim = attention.heads, attention.kv, attention.dim
    if attention.qk_norm is not None:
        return WideHeads(heads, kv, dim, dim)
    width = (dim // MULTIPLE + 1) * MULTIPLE
    constants = CONSTANT * (1 + torch.arange(128, dtype=torch.float64) / 128)
    wanted = constants.square() * (width - dim) / width * attention.scale * width**0.5

    # By constant, the gains minus one of bfloat16's grid around the root of what is wanted.
    near = (wanted.sqrt() - 1).bfloat16().double()
    step = 2.0 ** (near.log2().floor() - 7)
    grid = (near[:, None] + step[:, None] * torch.arange(-8, 9)).bfloat16().double()
    found = (1 + grid[:, :, None]) * (1 + grid[:, None, :])
    error = (found / wanted[:, None, None] - 1).abs()
    best = int(error.argmin())
    at, q, k = best // 17**2, best // 17 % 17, best % 17
    gains = float(grid[at, q]), float(grid[at, k])
    return WideHeads(heads, kv, dim, width, float(constants[at]), *gains)


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model as one of the class."""
    config = build_config(checkpoint.config)
    return build_checkpoint(
        checkpoint, config, qwen3_5, lambda key, part: build_tensor(checkpoint, key, part)
    )


def build_tensor(checkpoint: Checkpoint, key: Key, placed: PlacedPart) -> LazyTensor:
    """One tensor of the class from the model's."""
    role, layer = key
    usual = checkpoint.tensors["norm.final.weight", None].dtype
    attention = attention_of(checkpoint)
    if role.startswith("delta."):
        return build_delta(checkpoint, key, placed, attention)

    role = role.replace("q_gate", "q")  # the gate is made here
    own = find_own(checkpoint, role, layer)
    # Short floats would round a gain once more when one is taken from it.
    dtype = torch.float32 if placed.part.axes.unit else own.dtype if own else usual
    if own is not None and not (role.startswith("attn.") or placed.part.axes.unit):
        return copy_tensor(own)

    wide = widen_heads(attention)

    def read() -> Tensor:
        value = own.read() if own else missing_value(role, attention, wide)
        return hold(role, value.to(dtype), wide).contiguous()

    sources = own.provenance.sources if own else ()
    provenance = Provenance("grown" if own else "fresh", sources, "in the class's form")
    return LazyTensor(placed.shape, dtype, provenance, read)


def attention_of(checkpoint: Checkpoint) -> Attention:
    """The source's softmax attention, the same in all layers."""
    anatomy = checkpoint.anatomy
    host = anatomy.host(checkpoint.config)
    return Attention(**host.attention(anatomy.host_config(checkpoint.config), 0))


def missing_value(role: str, attention: Attention, wide: WideHeads) -> Tensor:
    """What stands for a tensor that the source does not have: a bias of zero, or the gain of a
    norm, one more than the class stores.
    """
    _, part, kind = role.split(".")
    if kind == "bias":
        heads = {"q": wide.heads, "k": wide.kv, "v": wide.kv}
        return torch.zeros(heads[part] * wide.dim if part in heads else attention.hidden)
    gain = wide.q_gain if part == "q_norm" else wide.k_gain
    return torch.full((wide.dim,), gain + 1, dtype=torch.float64)


def hold(role: str, value: Tensor, wide: WideHeads) -> Tensor:
    """A tensor of the source in the class's form."""
    group, part, kind = (*role.split("."), "")[:3]
    if group == "norm" or part.endswith("_norm"):
        behind = value.new_zeros(wide.width - wide.dim) if group == "attn" else value[:0]
        return torch.cat((value, behind)) - 1
    constant = wide.constant if kind == "bias" else 0.0
    if part == "q":  # the gate's rows lie behind each head's
        return widen_rows(value, wide.heads, 2 * wide.width, wide, constant)
    if part in "kv":
        return widen_rows(value, wide.kv, wide.width, wide, constant if part == "k" else 0.0)
    if kind == "bias":
        return value
    return 2 * widen_rows(value.T, wide.heads, wide.width, wide).T  # the gate is one half


def widen_rows(
    value: Tensor, heads: int, rows: int, wide: WideHeads, constant: float = 0.0
) -> Tensor:
    """(heads * dim, ...) -> (heads * rows, ...), zero behind a head's own rows.

    Args:
        value: rows of all heads.
        heads: how many.
        rows: of a head in the result.
        wide: says which of them are constants.
        constant: what those are.
    """
    out = value.new_zeros(heads, rows, *value.shape[1:])
    out[:, : wide.dim] = value.unflatten(0, (heads, wide.dim))
    out[:, wide.dim : wide.width] = constant
    return out.flatten(0, 1)


def build_delta(
    checkpoint: Checkpoint, key: Key, placed: PlacedPart, attention: Attention
) -> LazyTensor:
    """One tensor of a layer with the gated delta rule, from the mixer's."""
    role, layer = key
    _, part, kind = (*role.split("."), "weight")[:3]
    names = {
        "qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "conv": ("conv_q.weight", "conv_k.weight", "conv_v.weight"),
        "o": ("o_proj.weight",),
        "rate": ("rate",),
        "norm": ("norm",),
    }.get(part, (f"{part}.{kind}",))
    found = [checkpoint.tensors[f"mixer.{name}", layer] for name in names]
    states = attention.kv if is_grouped(checkpoint, layer) else attention.heads

    def read() -> Tensor:
        pieces = [one.read() for one in found]
        # Of the source's query heads, which all have a state in the class.
        if part in ("qkv", "conv"):
            first, *others = (piece.reshape(-1, placed.shape[-1]) for piece in pieces)
            pieces = [first, *(per_query(one, states, attention) for one in others)]
        elif part in ("beta", "decay", "rate"):
            pieces = [per_query(pieces[0], states, attention)]
        return torch.cat(pieces).reshape(placed.shape)

    sources = tuple(name for one in found for name in one.provenance.sources)
    is_copy = len(found) == 1 and found[0].shape == placed.shape
    provenance = Provenance("copied" if is_copy else "grown", sources, "in the class's form")
    return LazyTensor(placed.shape, found[0].dtype, provenance, read)


def is_grouped(checkpoint: Checkpoint, layer: int | None) -> bool:
    """Whether the query heads of a group share a state in a layer's mixer."""
    spec = mixers_of(checkpoint.config)[layer] if layer is not None else None
    return bool(spec and GatedDeltaNet.parse(spec).grouped)


def per_query(value: Tensor, states: int, attention: Attention) -> Tensor:
    """Rows of each state, repeated for the query heads that share it."""
    blocks = value.unflatten(0, (states, -1))
    return blocks.repeat_interleave(attention.heads // states, 0).flatten(0, 1)


target = ExportTarget(
    name="qwen3_5",
    loads="Qwen3_5ForCausalLM of transformers",
    engines=name_engines("Qwen3_5ForCausalLM", ", in bfloat16 on a processor"),
    find_misfits=find_misfits,
    convert=convert,
    build_config=build_config,
    remix={"mixer": GatedDeltaNet.name, "window": 0, "sinks": 0, "options": OPTIONS},
    method="aligned",
)
