"""MXFP4 experts, as gpt-oss stores them.

OCP Microscaling Formats v1.0: 32 numbers of E2M1 share a power of two. `X_blocks` is (experts,
outputs, blocks, 16), two numbers a byte with the first in the low half; `X_scales` (experts,
outputs, blocks) has the exponents plus 127. The model's own tensor X is (experts, inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import RegraftError
from .entry import Found

# E2M1: one bit of sign, two of exponent, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])
BLOCK = 32


def claim(found: Found) -> None:
    """Claim blocks with their scales; RegraftError where one lacks the other."""
    for name in found.names("_blocks"):
        blocks = found.entries[f"{name}_blocks"]
        found.require(f"{name}_scales", f"{name}_blocks")
        if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK // 2:
            raise RegraftError(
                f"'{name}_blocks' has the shape {list(blocks.shape)}, not (experts, outputs, "
                "blocks, 16): fetch the model again"
            )
        experts, outputs, count, _ = blocks.shape
        pieces = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        found.add(name, (experts, count * BLOCK, outputs), pieces, compute)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Numbers from bytes of two, the first in the low half: (.., n) -> (.., 2 n), float32."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1)
    return E2M1[both.long()].flatten(-2)


def compute(stored: Mapping[str, Tensor]) -> Tensor:
    """The weights, (experts, inputs, outputs), in float32."""
    exponents = stored["scales"].int().unsqueeze(-1) - 127
    # An expert at a time: the numbers take eight times what is stored.
    experts = [
        torch.ldexp(unpack_e2m1(blocks), exponent).flatten(-2).T
        for blocks, exponent in zip(stored["blocks"], exponents, strict=True)
    ]
    return torch.stack(experts)
