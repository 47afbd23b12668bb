"""compressed-tensors: float8, int8, packed integers and FP4, as llm-compressor writes them.

`X.weight` or `X.weight_packed` with `X.weight_scale`, and where zeros are not in the middle
`X.weight_zero_point`. Packed integers lie in int32 words along the inputs, lowest first, plus half
of their range. NVFP4 has two E2M1 numbers a byte, a float8 scale for 16 of them, divided by
`X.weight_global_scale`. MXFP4 and MXFP8 have a power of two for 32 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import RegraftError
from ..safetensors import TensorEntry
from .entry import Found, find_block, read_power_of_two, spread_scale
from .mxfp4 import unpack_e2m1
from .packing import WORD, check_bits, check_words, count_bits, group_inputs, unpack

FORMATS = (
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def claim(found: Found) -> None:
    """Claim weights with their scales; RegraftError for a format that is not known."""
    check_format(found.config)
    for name in found.names(".weight_packed"):
        claim_packed(found, name)
    for name in found.names(".weight_scale"):
        weight = found.require(f"{name}.weight", f"{name}.weight_scale")
        scale = found.entries[f"{name}.weight_scale"]
        settings = next(iter(list_settings(found.config)), {})
        block = find_block(scale.shape, weight.shape, settings.get("block_structure"))
        pieces = {one: f"{name}.{one}" for one in ("weight", "weight_scale", "weight_zero_point")}
        found.add(f"{name}.weight", weight.shape, pieces, partial(compute, block=block))
    why = "scale of activations or caches, which are not quantised here"
    endings = ("input_scale", "input_zero_point", "output_scale", "input_global_scale")
    found.drop(tuple(f".{ending}" for ending in (*endings, "k_scale", "v_scale", "q_scale")), why)


def check_format(config: Mapping[str, Any]) -> None:
    """RegraftError for a format that is not read, sparse weights, and rotated activations.

    Args:
        config: `quantization_config`.
    """
    take = "take the model that it was made from"
    formats = {str(config.get("format"))} | {
        str(one["format"]) for one in list_groups(config) if one.get("format")
    }
    if unknown := sorted(formats - {*FORMATS, "mixed-precision"}):
        raise RegraftError(
            f"quantization_config has the format '{unknown[0]}', which is not read: {take}, or one "
            f"in {', '.join(FORMATS)}"
        )
    sparse = dict(config.get("sparsity_config") or {}).get("format") or "dense"
    if sparse != "dense":
        raise RegraftError(
            f"quantization_config has sparse weights in the format '{sparse}', which are not read: "
            f"{take}"
        )
    if dict(config.get("transform_config") or {}).get("config_groups"):
        raise RegraftError(
            "quantization_config has a transform_config, which rotates weights and activations "
            f"and is not read: {take}"
        )


def list_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Groups of layers that are quantised alike."""
    return [one for one in dict(config.get("config_groups") or {}).values() if one]


def list_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How weights are quantised, for each group of layers."""
    weights = (one.get("weights") for one in list_groups(config))
    return [one for one in weights if isinstance(one, Mapping)]


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
    if len(packed.shape) != 2:
        raise RegraftError(
            f"'{packed.name}' has the shape {list(packed.shape)}, where a matrix is read: take the "
            "model that it was made from"
        )
    rows, columns = packed.shape
    if packed.dtype == "U8":
        found.add(f"{name}.weight", (rows, 2 * columns), pieces, compute_fp4)
        return
    check_words(found, packed.name)
    inputs, bits = size_packed(found, name, packed, scale)
    found.add(
        f"{name}.weight", (rows, inputs), pieces, partial(compute_packed, bits=bits, inputs=inputs)
    )


def size_packed(
    found: Found, name: str, packed: TensorEntry, scale: TensorEntry
) -> tuple[int, int]:
    """(columns, bits of a number) of packed integers, which may differ from layer to layer.

    Args:
        found: what the files hold.
        name: of the layer.
        packed: the words.
        scale: one for each group of columns.
    """
    words, groups = packed.shape[1], scale.shape[-1] if len(scale.shape) == 2 else 1
    settings = list_settings(found.config)
    said = [one["num_bits"] for one in settings if type(one.get("num_bits")) is int] or [4]
    for bits in said:
        check_bits(bits, BITS, f"the quantization_config of '{name}'")

    # The groups tell the columns, and nothing but the headers is read.
    pairs = ((groups * (one.get("group_size") or 0), one.get("num_bits", 4)) for one in settings)
    fits = {pair for pair in pairs if groups > 1 and -(-pair[0] * pair[1] // WORD) == words}
    if len(fits) == 1:
        return fits.pop()
    if shape := found.entries.get(f"{name}.weight_shape"):
        inputs = int(shape.peek()[-1])
        known = [bits for bits in said if -(-inputs * bits // WORD) == words]
        return inputs, known[0] if known else count_bits(words, inputs, said[0])
    return words * WORD // said[0], said[0]


def compute(stored: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
    """A weight of float8 or int8, in float32.

    Args:
        stored: `weight`, `weight_scale` and perhaps `weight_zero_point`.
        block: rows and columns that share a scale.
    """
    weight = stored["weight"].float()
    scale = read_power_of_two(stored["weight_scale"])
    if "weight_zero_point" in stored:
        weight -= spread_scale(stored["weight_zero_point"].float(), tuple(weight.shape), block)
    return weight * spread_scale(scale, tuple(weight.shape), block)


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
    if scales.numel() == 1:  # of the whole tensor
        scales = scales.expand(len(numbers), 1)
    zeros = torch.full_like(scales, half, dtype=torch.int32)
    if (stored_zeros := stored.get("weight_zero_point")) is not None:
        packed = stored_zeros.dtype == torch.int32  # along the outputs; else as they are
        zeros = unpack(stored_zeros.T, bits).T[: len(numbers)] if packed else stored_zeros + half
        zeros = zeros.expand(scales.shape)
    group = stored.get("weight_g_idx", group_inputs(inputs, scales.shape[1], None)).long()
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
