"""bitsandbytes: NF4 and FP4 in blocks (QLoRA, arXiv 2305.14314), and LLM.int8() (arXiv 2208.07339).

In 4 bits `X` has two numbers a byte, the first in the high half. Each is an index into
`X.quant_map`; a block of them has one factor in `X.absmax`. With double quantisation the factors
are bytes with a map, factors and an offset of their own. `X.quant_state.bitsandbytes__nf4` is JSON
in bytes. In 8 bits `X.weight` is int8 and `X.SCB` the largest absolute value of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from ...errors import RegraftError
from ..files import parse_json
from ..safetensors import TensorEntry
from ..schema import check_json
from .entry import Found

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
LARGEST = 127  # of int8, which stands for the largest value of its row


class QuantState(TypedDict):
    """What is told of a tensor in 4 bits."""

    shape: list[int]
    blocksize: int  # numbers that share a factor
    nested_blocksize: NotRequired[int]  # factors that share one
    nested_offset: NotRequired[float]  # added to factors


def claim(found: Found) -> None:
    """Claim weights in 4 and 8 bits; RegraftError for a piece that is missing or garbled."""
    for kind in KINDS:
        for name in found.names(STATE + kind):
            claim_4_bits(found, name, kind)
    for name in found.names(".SCB"):
        weight = found.require(f"{name}.weight", f"{name}.SCB")
        pieces = {one: f"{name}.{one}" for one in ("weight", "SCB", "weight_format")}
        found.add(f"{name}.weight", weight.shape, pieces, compute_8_bits)


def claim_4_bits(found: Found, name: str, kind: str) -> None:
    """Claim one weight.

    Args:
        found: what the files hold.
        name: of the weight.
        kind: nf4 or fp4.
    """
    state = read_state(found.entries[f"{name}{STATE}{kind}"])
    for ending in ("", ".absmax", ".quant_map"):
        found.require(name + ending, f"{name}{STATE}{kind}")
    pieces = {
        "weight": name,
        "state": f"{name}{STATE}{kind}",
        **{
            one: f"{name}.{one}"
            for one in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        },
    }
    found.add(name, tuple(state["shape"]), pieces, partial(compute_4_bits, state=state))


def read_state(entry: TensorEntry) -> QuantState:
    """The JSON in a tensor of bytes, some 200 of them."""
    where = f"'{entry.name}' in '{entry.file}'"
    raw = bytes(entry.peek().to(torch.uint8).tolist())
    value: Any = parse_json(raw, where, "fetch the model again")
    known = {key: value[key] for key in value if key in QuantState.__annotations__}
    state: QuantState = check_json(known, QuantState, where, "fetch the model again")
    return state


def compute_4_bits(stored: Mapping[str, Tensor], state: QuantState) -> Tensor:
    """A weight in 4 bits, in float32.

    Args:
        stored: the pieces.
        state: what is told of them.
    """
    # Bytes may be stored as another dtype, `bnb_4bit_quant_storage`.
    packed = stored["weight"].contiguous().flatten().view(torch.uint8)
    indices = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()
    factors = stored["absmax"]
    if "nested_absmax" in stored:
        outer = stored["nested_absmax"].float()
        inner = stored["nested_quant_map"].float()[factors.long()]
        spread = outer.repeat_interleave(state.get("nested_blocksize", 256))[: len(inner)]
        factors = inner * spread + state.get("nested_offset", 0.0)
    count = torch.Size(state["shape"]).numel()
    values = stored["quant_map"].float()[indices[:count]]
    spread = factors.float().repeat_interleave(state["blocksize"])[:count]
    return (values * spread).reshape(state["shape"])


def compute_8_bits(stored: Mapping[str, Tensor]) -> Tensor:
    """A weight in 8 bits, in float32; RegraftError for one in the order of a GPU's tiles."""
    order = stored.get("weight_format")
    if order is not None and order.any():
        raise RegraftError(
            f"an int8 weight has weight_format {order.tolist()}, an order of GPU tiles: save the "
            "model again with a newer bitsandbytes"
        )
    return stored["weight"].float() * stored["SCB"].float().reshape(-1, 1) * (1 / LARGEST)
