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

WORD = 32
BITS = (2, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_VERSION = "gemm"


def claim_gptq(found: Found) -> None:
    """Claim the pieces of GPTQ layers; RegraftError for an unknown number of bits."""
    bits = read_bits(found, BITS)
    version = str(found.config.get("checkpoint_format") or "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise RegraftError(
            f"quantization_config has checkpoint_format '{version}', which is not read: take the "
            "model that it was made from, or one in format gptq or gptq_v2"
        )
    for name in found.names(".qweight"):
        rows, outputs = found.entries[f"{name}.qweight"].shape
        add_layer(
            found,
            name,
            (outputs, rows * WORD // bits),
            partial(compute_gptq, bits=bits, offset=int(version == "gptq")),
        )


def claim_awq(found: Found) -> None:
    """Claim the pieces of AWQ layers; RegraftError for another packing than GEMM in 4 bits."""
    bits = read_bits(found, (4,))
    version = str(found.config.get("version") or AWQ_VERSION).lower()
    if version != AWQ_VERSION:
        raise RegraftError(
            f"quantization_config has version '{version}', which is not read: take the model that "
            f"it was made from, or one in version {AWQ_VERSION}"
        )
    for name in found.names(".qweight"):
        inputs, columns = found.entries[f"{name}.qweight"].shape
        add_layer(found, name, (columns * WORD // bits, inputs), compute_awq)


def read_bits(found: Found, known: tuple[int, ...]) -> int:
    """Bits of a number; RegraftError when they are not known."""
    bits = found.config.get("bits", found.config.get("w_bit", 4))
    if bits not in known:
        raise RegraftError(
            f"quantization_config has {bits!r} bits, which are not read: take the model that it "
            f"was made from, or one with {' or '.join(map(str, known))}"
        )
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


def unpack(words: Tensor, bits: int) -> Tensor:
    """The integers in words of 32 bits, lowest first: (.., n) -> (.., n * 32 / bits)."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def compute_gptq(stored: Mapping[str, Tensor], bits: int, offset: int) -> Tensor:
    """The weight of a GPTQ layer, (outputs, inputs), in float32.

    Args:
        stored: the pieces by name; `g_idx` may be missing.
        bits: of a number.
        offset: what zeros are stored less by.
    """
    numbers = unpack(stored["qweight"].T, bits)  # (outputs, inputs)
    zeros = (unpack(stored["qzeros"], bits) + offset) & (2**bits - 1)  # (groups, outputs)
    scales = stored["scales"].float()
    inputs, groups = numbers.shape[1], scales.shape[0]
    usual = torch.arange(inputs) // -(-inputs // groups)
    group = stored.get("g_idx", usual).long()
    return (numbers - zeros[group].T).float() * scales[group].T


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
