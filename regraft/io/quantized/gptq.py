"""GPTQ and AWQ: integers of a few bits in int32, with scales and zeros for groups of inputs.

GPTQ (arXiv 2210.17323) packs inputs: `qweight` (inputs * bits / 32, outputs), `qzeros` (groups,
outputs * bits / 32), `scales` (groups, outputs), `g_idx` (inputs) with the group of every input.
Zeros are stored less one, unless `checkpoint_format` is gptq_v2. AWQ (arXiv 2306.00978) packs
outputs in 4 bits, in the order 0 2 4 6 1 3 5 7: `qweight` (inputs, outputs / 8). In both the weight
is (integer - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ...errors import RegraftError
from ..computed_tensor import Compute
from .entry import Found
from .packing import WORD, check_bits, check_words, count_bits, group_inputs, unpack

BITS = (2, 3, 4, 8)
AWQ_BITS = (4,)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_VERSION = "gemm"


def claim_gptq(found: Found) -> None:
    """Claim the pieces of GPTQ layers; RegraftError for an unknown number of bits or order."""
    said = read_bits(found, BITS)
    version = read_version(found, "checkpoint_format", "format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise RegraftError(
            f"quantization_config has checkpoint_format '{version}', which is not read: take the "
            "model that it was made from, or one in format gptq or gptq_v2"
        )
    for name in found.names(".qweight"):
        check_words(found, f"{name}.qweight")
        rows, outputs = found.entries[f"{name}.qweight"].shape
        zeros = found.require(f"{name}.qzeros", f"{name}.qweight")
        bits = count_bits(zeros.shape[-1], outputs, said)
        check_bits(bits, BITS, f"'{name}'")
        order = found.entries.get(f"{name}.g_idx")
        inputs = order.shape[0] if order else rows * WORD // bits
        compute = partial(
            compute_gptq,
            bits=bits,
            less_one=version == "gptq",
            group_size=found.config.get("group_size"),
        )
        add_layer(found, name, (outputs, inputs), compute)


def claim_awq(found: Found) -> None:
    """Claim the pieces of AWQ layers; RegraftError for another packing than GEMM in 4 bits."""
    said = read_bits(found, AWQ_BITS)
    version = read_version(found, "version", "checkpoint_format", "format") or AWQ_VERSION
    if version != AWQ_VERSION:
        raise RegraftError(
            f"quantization_config has version '{version}', which is not read: take the model that "
            f"it was made from, or one in version {AWQ_VERSION}"
        )
    for name in found.names(".qweight"):
        check_words(found, f"{name}.qweight")
        inputs, columns = found.entries[f"{name}.qweight"].shape
        scales = found.require(f"{name}.scales", f"{name}.qweight")
        check_bits(count_bits(columns, scales.shape[-1], said), AWQ_BITS, f"'{name}'")
        add_layer(found, name, (scales.shape[-1], inputs), compute_awq)


def read_version(found: Found, *keys: str) -> str:
    """How numbers are laid out: what the first key of the config says that has a value, or ""."""
    return str(next(filter(None, map(found.config.get, keys)), "")).lower()


def read_bits(found: Found, known: tuple[int, ...]) -> int:
    """Bits of a number as the config has them; RegraftError when they are not known."""
    bits = found.config.get("bits", found.config.get("w_bit", 4))
    check_bits(bits, known, "quantization_config")
    return int(bits)


def add_layer(found: Found, name: str, shape: tuple[int, int], compute: Compute) -> None:
    """Claim one layer.

    Args:
        found: what the files hold.
        name: of the layer.
        shape: of its weight, (outputs, inputs).
        compute: the weight from the pieces.
    """
    for piece in ("qzeros", "scales"):
        found.require(f"{name}.{piece}", f"{name}.qweight")
    pieces = {one: f"{name}.{one}" for one in ("qweight", "qzeros", "scales", "g_idx")}
    found.add(f"{name}.weight", shape, pieces, compute)


def compute_gptq(
    stored: Mapping[str, Tensor], bits: int, less_one: bool, group_size: object
) -> Tensor:
    """The weight of a GPTQ layer, (outputs, inputs), in float32.

    Args:
        stored: the pieces by name; `g_idx` may be missing.
        bits: of a number.
        less_one: whether zeros are stored less one.
        group_size: inputs of a group, as the config has them.
    """
    numbers = unpack(stored["qweight"].T, bits)  # (outputs, inputs)
    scales = stored["scales"].float()
    groups, outputs = scales.shape
    zeros = unpack_zeros(stored["qzeros"], bits, less_one)[:, :outputs]
    usual = group_inputs(numbers.shape[1], groups, group_size)
    group = stored.get("g_idx", usual).long()
    numbers = numbers[:, : len(group)]
    return (numbers - zeros[group].T).float() * scales[group].T


def unpack_zeros(words: Tensor, bits: int, less_one: bool) -> Tensor:
    """Zeros of a GPTQ layer, (groups, outputs), integers.

    Args:
        words: as stored, (groups, outputs * bits / 32).
        bits: of a number.
        less_one: whether they are stored less one. One is added to all numbers of a word at once,
            as writers subtract it: a zero of 0 borrows from the number above it.
    """
    if less_one and WORD % bits == 0:
        ones = sum(1 << place for place in range(0, WORD, bits))
        words = (words.long() + ones).int()
    zeros = unpack(words, bits)
    return (zeros + 1) & (2**bits - 1) if less_one and WORD % bits else zeros


def compute_awq(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight of an AWQ layer, (outputs, inputs), in float32.

    Args:
        stored: the pieces by name.
    """
    place = torch.tensor(AWQ_ORDER).argsort()
    numbers, zeros = (
        unpack(stored[piece], 4).unflatten(-1, (-1, len(place)))[..., place].flatten(-2)
        for piece in ("qweight", "qzeros")
    )
    size = numbers.shape[0] // zeros.shape[0]
    zeros, scales = (one.repeat_interleave(size, 0) for one in (zeros, stored["scales"].float()))
    return ((numbers - zeros).float() * scales).T
