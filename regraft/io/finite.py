"""Numbers that are NaN or infinite: found in one pass, counted and named."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegraftError


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    # NaN and infinity come out of a sum, which is the fastest pass there is. A sum of finite ones
    # may overflow as well, so a second pass decides then.
    if not value.numel() or bool(value.sum().isfinite()):
        return True
    return all(bool(bound.isfinite()) for bound in value.aminmax())


def count_nonfinite(value: Tensor) -> tuple[int, int]:
    """(how many numbers of a tensor are NaN, how many are infinite)."""
    if is_finite(value):
        return 0, 0
    return int(value.isnan().sum()), int(value.isinf().sum())


def check_finite(value: Tensor, subject: str, advice: str) -> None:
    """RegraftError with the counts when a tensor holds NaN or infinity.

    Args:
        value: the tensor.
        subject: what the error calls it.
        advice: what the error says to do.
    """
    if is_finite(value):
        return
    nan, infinite = count_nonfinite(value)
    raise RegraftError(
        f"{subject} holds NaN or infinity ({nan} NaN and {infinite} infinite of {value.numel()} "
        f"numbers): {advice}"
    )


def cast_finite(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype.

    RegraftError, with the largest of them, when it holds finite numbers beyond the dtype's range.

    Args:
        value: the tensor.
        dtype: the dtype.
        name: what the error calls the tensor.
    """
    out = value.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(value.dtype).max or is_finite(out):
        return out

    lost = value[out.isinf() & value.isfinite()]
    if lost.numel():
        worst = float(lost[lost.abs().argmax()])
        known = str(dtype).removeprefix("torch.")
        raise RegraftError(
            f"tensor '{name}' holds {worst:g}, beyond the range of {known} "
            f"({torch.finfo(dtype).max:g}; {lost.numel()} of {value.numel()} numbers): store it as "
            "bfloat16 or float32"
        )
    return out
