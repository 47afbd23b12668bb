"""FP8 weights with a scale for each block, row or tensor.

`X` is float8 and `X_scale_inv` (DeepSeek-V3, arXiv 2412.19437, and transformers'
`FineGrainedFP8Config`) or `X_scale` its scale: a number is float8 times scale, whatever the name
says. Scales of one byte are exponents (MXFP8).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from .entry import Found, find_block, read_power_of_two, spread_scale

SCALES = ("_scale_inv", "_scale")
FLOAT8 = ("F8_E4M3", "F8_E5M2")


def claim(found: Found) -> None:
    """Claim float8 weights with their scales; RegraftError where one has none."""
    said = found.config.get("weight_block_size")
    for name in [name for name, one in found.entries.items() if one.dtype in FLOAT8]:
        weight = found.entries[name]
        ending = next((one for one in SCALES if name + one in found.entries), SCALES[0])
        scale = found.require(name + ending, name)
        block = find_block(scale.shape, weight.shape, said)
        pieces = {"weight": name, "scale": name + ending}
        found.add(name, weight.shape, pieces, partial(compute, block=block))
    found.drop(
        (".activation_scale", ".input_scale", ".input_scale_ub"),
        "scale of activations, which are not quantised here",
    )


def compute(stored: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
    """The weights, in float32.

    Args:
        stored: `weight` and `scale`.
        block: rows and columns that share a scale.
    """
    weight = stored["weight"].float()
    return weight * spread_scale(read_power_of_two(stored["scale"]), tuple(weight.shape), block)
