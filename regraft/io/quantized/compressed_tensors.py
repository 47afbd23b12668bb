"""compressed-tensors: float8, int8, packed integers and NVFP4, as llm-compressor writes them.

`X.weight` or `X.weight_packed` with `X.weight_scale`, and where zeros are not in the middle
`X.weight_zero_point`. Packed integers lie in int32 words along the inputs, lowest first, plus half
of their range. NVFP4 has two E2M1 numbers a byte, a float8 scale for 16 of them, divided by
`X.weight_global_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import RegraftError
from .entry import Found, find_block, read_power_of_two, spread_scale
from .gptq import WORD, unpack
from .mxfp4 import unpack_e2m1

FORMATS = (
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
BITS = (2, 4, 8)


def claim(found: Found) -> None:
    """Claim weights with their scales; RegraftError for a format that is not known."""
    for name in found.names(".weight_packed"):
        claim_packed(found, name)
    for name in found.names(".weight_scale"):
        weight = found.require(f"{name}.weight", f"{name}.weight_scale")
        scale = found.entries[f"{name}.weight_scale"]
        block = find_block(scale.shape, weight.shape, find_settings(found).get("block_structure"))
        pieces = {one: f"{name}.{one}" for one in ("weight", "weight_scale", "weight_zero_point")}
        found.add(f"{name}.weight", weight.shape, pieces, partial(compute, block=block))
    why = "scale of activations or caches, which are not quantised here"
    endings = ("input_scale", "input_zero_point", "output_scale", "input_global_scale")
    found.drop(tuple(f".{ending}" for ending in (*endings, "k_scale", "v_scale", "q_scale")), why)


def find_settings(found: Found) -> Mapping[str, Any]:
    """How weights are quantised, by the first group of layers; RegraftError for a format that is
    not known.
    """
    groups = [one for one in dict(found.config.get("config_groups") or {}).values() if one]
    formats = {str(found.config.get("format"))} | {
        str(one["format"]) for one in groups if one.get("format")
    }
    if unknown := sorted(formats - {*FORMATS, "mixed-precision"}):
        raise RegraftError(
            f"quantization_config has the format '{unknown[0]}', which is not read: take the model "
            f"that it was made from, or one in {', '.join(FORMATS)}"
        )
    weights = [one["weights"] for one in groups if isinstance(one.get("weights"), Mapping)]
    return weights[0] if weights else {}


def claim_packed(found: Found, name: str) -> None:
    """Claim a weight with several numbers in a word or byte.

    Args:
        found: what the files hold.
        name: of the layer.
    """
    packed = found.entries[f"{name}.weight_packed"]
    scale = found.require(f"{name}.weight_scale", f"{name}.weight_packed")
    roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    pieces = {one: f"{name}.{one}" for one in (*roles, "weight_g_idx", "weight_global_scale")}
    rows, columns = packed.shape
    settings = find_settings(found)
    if packed.dtype == "U8":
        found.add(f"{name}.weight", (rows, 2 * columns), pieces, compute_fp4)
        return
    bits = settings.get("num_bits", 4)
    if bits not in BITS:
        raise RegraftError(
            f"'{name}' has {bits!r} bits, which are not read: take the model that it was made from"
        )
    inputs, size = columns * WORD // bits, settings.get("group_size")
    if isinstance(size, int) and size > 0 and scale.shape[-1] > 1:
        inputs = scale.shape[-1] * size
    found.add(
        f"{name}.weight", (rows, inputs), pieces, partial(compute_packed, bits=bits, inputs=inputs)
    )


def compute(stored: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
    """A weight of float8 or int8, in float32.

    Args:
        stored: `weight`, `weight_scale` and perhaps `weight_zero_point`.
        block: rows and columns that share a scale.
    """
    weight = stored["weight"].float()
    if "weight_zero_point" in stored:
        weight -= spread_scale(stored["weight_zero_point"].float(), tuple(weight.shape), block)
    return weight * spread_scale(stored["weight_scale"].float(), tuple(weight.shape), block)


def compute_packed(stored: Mapping[str, Tensor], bits: int, inputs: int) -> Tensor:
    """A weight of packed integers, (outputs, inputs), in float32.

    Args:
        stored: the pieces by name.
        bits: of a number.
        inputs: columns of the weight.
    """
    half = 1 << (bits - 1)
    numbers = unpack(stored["weight_packed"], bits)[:, :inputs]
    scales = stored["weight_scale"].float()
    zeros = torch.full_like(scales, half, dtype=torch.int32)
    if (stored_zeros := stored.get("weight_zero_point")) is not None:
        packed = stored_zeros.dtype == torch.int32  # along the outputs; else as they are
        zeros = unpack(stored_zeros.T, bits).T[: len(numbers)] if packed else stored_zeros + half
    usual = torch.arange(inputs) // -(-inputs // scales.shape[1])
    group = stored.get("weight_g_idx", usual).long()
    return (numbers - zeros[:, group]).float() * scales[:, group]


def compute_fp4(stored: Mapping[str, Tensor]) -> Tensor:
    """A weight of E2M1 numbers, (outputs, inputs), in float32.

    Args:
        stored: the pieces by name; NVFP4 has a global scale, MXFP4 exponents as scales.
    """
    numbers = unpack_e2m1(stored["weight_packed"])
    scales = read_power_of_two(stored["weight_scale"])
    if "weight_global_scale" in stored:
        scales = scales / stored["weight_global_scale"].float()
    return numbers * scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)
