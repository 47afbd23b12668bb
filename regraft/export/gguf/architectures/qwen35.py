"""qwen35: the text model of Qwen3.5, layers of gated softmax attention and of gated delta rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....families.qwen3_5_text import LINEAR
from ..architecture import GGUFArchitecture
from ..states import count_taps, store_decay, store_taps

# The class adds it to the squared length of queries and keys, llama.cpp rms_norm_eps: Llama's 1e-5
# moves logits by less than 1e-4 of the largest.
LENGTH_EPS, LARGEST_EPS = 1e-6, 1e-5
# Tensors whose last rows are by head of values, and those with one row a head.
BY_VALUE = ("delta.qkv.weight", "delta.conv.weight", "delta.gate.weight")
BY_HEAD = ("delta.beta.weight", "delta.decay.weight", "delta.decay.bias", "delta.rate")


def find_keys(stock: Any) -> dict[str, Any]:
    """Which layers have the delta rule, its sizes, and the share of each position in a head.

    A text's three positions are one; frequencies without a share would not be rotated.
    """
    rope = stock.rope_parameters
    half = int(stock.head_dim * (rope.get("partial_rotary_factor") or 1)) // 2
    heads = stock.linear_num_value_heads
    return {
        "attention.recurrent_layers": [kind == LINEAR for kind in stock.layer_types],
        "rope.dimension_sections": [(half + 2) // 3, (half + 1) // 3, half // 3, 0],
        "ssm.conv_kernel": count_taps(stock.linear_conv_kernel_dim),
        "ssm.state_size": stock.linear_key_head_dim,
        "ssm.group_count": stock.linear_num_key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": stock.linear_value_head_dim * heads,
    }


def store(role: str, value: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """A tensor in llama.cpp's form."""
    if role == "delta.conv.weight":
        value = store_taps(value)
    if role == "delta.rate":
        value = store_decay(value)
    if role in BY_VALUE:
        rows = sizes["key_head"] * sizes["value_group"] * sizes["value_dim"]
        return torch.cat((value[:-rows], spread_heads(value[-rows:], sizes)))
    if role in BY_HEAD:
        return spread_heads(value, sizes)
    return spread_heads(value.T, sizes).T if role == "delta.o.weight" else value


def spread_heads(value: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Rows of all heads of values, the first of each group before the second of each: llama.cpp
    repeats the list of keys, the class each key.
    """
    heads = value.unflatten(0, (sizes["key_head"], sizes["value_group"], -1))
    return heads.transpose(0, 1).flatten(0, 2)


def find_misfits(stock: Any) -> list[str]:
    """Layers of one kind alone, values of another width than keys, and a large rms_norm_eps."""
    found = []
    if len(set(stock.layer_types)) < 2:
        found.append("its layers are all of one kind, llama.cpp's qwen35 runs only with both")
    if stock.rms_norm_eps > LARGEST_EPS:
        found.append(
            f"rms_norm_eps is {stock.rms_norm_eps:g}, which llama.cpp adds to the squared lengths"
            f" of queries and keys too, the class {LENGTH_EPS:g}"
        )
    if stock.linear_value_head_dim != stock.linear_key_head_dim:
        found.append(
            f"linear_value_head_dim is {stock.linear_value_head_dim} and linear_key_head_dim"
            f" {stock.linear_key_head_dim}, in llama.cpp's qwen35 they are equal"
        )
    return found


def find_notes(stock: Any) -> list[str]:
    """The number that is added to squared lengths."""
    if stock.rms_norm_eps == LENGTH_EPS:
        return []
    return [
        f"llama.cpp adds rms_norm_eps ({stock.rms_norm_eps:g}) to the squared lengths of queries"
        f" and keys in gated delta layers, transformers {LENGTH_EPS:g}: short ones differ a little"
    ]


architecture = GGUFArchitecture(
    name="qwen35",
    families=("qwen3_5_text",),
    names="QWEN35",
    biases="attn.q_gate attn.k attn.v attn.o delta.decay",
    zero="attn.o",
    packed="attn.q_gate",
    reads=("mrope_section", "mrope_interleaved"),
    partial=True,
    hybrid=True,
    renamed={"delta.decay.bias": "blk.{}.ssm_dt.bias"},
    store=store,
    keys=find_keys,
    find_misfits=find_misfits,
    find_notes=find_notes,
)
