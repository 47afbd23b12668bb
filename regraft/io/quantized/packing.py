"""Integers of a few bits in words of 32, as GPTQ, AWQ and compressed-tensors store them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import RegraftError
from .entry import Found

WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """The integers in words of 32 bits, lowest first: (.., n) -> (.., n * 32 // bits), integers.

    Where `bits` does not divide 32, integers lie across the borders of words.
    """
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)

    starts = torch.arange(0, words.shape[-1] * WORD - bits + 1, bits)
    low = words.long() & (2**WORD - 1)
    both = low | (torch.nn.functional.pad(low[..., 1:], (0, 1)) << WORD)
    return ((both[..., starts // WORD] >> (starts % WORD)) & (2**bits - 1)).int()


def count_bits(words: int, numbers: int, said: int) -> int:
    """Bits of a number, from what a layer stores: layers of a model may have different ones.

    Args:
        words: of 32 bits that hold the numbers.
        numbers: in them.
        said: what the config says, which counts where it fits.
    """
    return said if -(-numbers * said // WORD) == words else words * WORD // max(numbers, 1)


def check_bits(bits: object, known: tuple[int, ...], where: str) -> None:
    """RegraftError when integers of so many bits are not read.

    Args:
        bits: of a number.
        known: those that are read.
        where: what has them, for the error.
    """
    if type(bits) is not int or bits not in known:
        raise RegraftError(
            f"{where} has {bits!r} bits, which are not read: take the model that it was made from, "
            f"or one with {' or '.join(map(str, known))}"
        )


def check_words(found: Found, name: str) -> None:
    """RegraftError when a tensor's numbers do not lie in words of 32 bits."""
    if (dtype := found.entries[name].dtype) != "I32":
        raise RegraftError(
            f"'{name}' is {dtype}, where words of 32 bits (I32) are read: take the model that it "
            "was made from"
        )


def group_inputs(inputs: int, groups: int, said: object) -> Tensor:
    """The group of every input where none is stored, (inputs,).

    Args:
        inputs: of the layer.
        groups: that have a scale.
        said: inputs of a group as the config has them, which counts where it fits; the last group
            may be smaller.
    """
    size = -(-inputs // max(groups, 1))
    if type(said) is int and said > 0 and -(-inputs // said) == groups:
        size = said
    return torch.arange(inputs) // size
