"""What llama.cpp's layers with a state want of their convolution and decay."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

TAPS = 4  # the kernels of some of its backends have 3, 4, 5, 9 or 15


def count_taps(taps: int) -> int:
    """Taps of a convolution in the file."""
    return max(taps, TAPS)


def store_taps(value: Tensor) -> Tensor:
    """A convolution by channel (channels, 1, taps) as (channels, taps), with zeros for older tokens
    where it has few taps.
    """
    return pad(value.flatten(1), (count_taps(value.shape[-1]) - value.shape[-1], 0))


def store_decay(value: Tensor) -> Tensor:
    """A rate of decay, stored as its logarithm, as the negative number that a step multiplies."""
    return -value.float().exp()
