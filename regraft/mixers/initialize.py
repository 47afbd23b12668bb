"""Initial values of a mixer's new weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import alibi_slopes


def create_initial_tensor(
    spec: str, shape: tuple[int, ...], generator: torch.Generator
) -> Float[Tensor, ...]:
    """A new float32 tensor, initialised as `spec` says.

    Args:
        spec: one of
            `zeros`, `ones`;
            `identity`: the last two axes hold the unit matrix;
            `last_tap`: one at the end of the last axis, zeros elsewhere: a causal convolution that
            gives its input;
            `constant x`;
            `uniform x`: on (-x, x);
            `normal std`;
            `timesteps a b`: inverse softplus of log-uniform numbers on (a, b), the bias of a
            state-space model's time step;
            `log_uniform a b`: logarithm of uniform numbers on (a, b);
            `log_counts`: log(1), log(2), ... along the last axis;
            `alibi_softplus heads e`, `alibi_log heads e`, `alibi_sigmoid heads e`: numbers whose
            softplus, exponential, or minus log-sigmoid over 16 are ALiBi's slopes of the heads, in
            equal parts of the tensor; e as of `attention.alibi_slopes`.
        shape: of the result.
        generator: source of the random numbers.

    Raises RegraftError for any other word.
    """
    word, *arguments = spec.split()
    values = [float(argument) for argument in arguments]

    def sample_uniform(low: float, high: float) -> Float[Tensor, ...]:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    makers: dict[str, Callable[..., Tensor]] = {
        "zeros": lambda: torch.zeros(shape),
        "ones": lambda: torch.ones(shape),
        "identity": lambda: torch.eye(shape[-2], shape[-1]).expand(shape).clone(),
        "last_tap": lambda: torch.eye(shape[-1])[-1].expand(shape).clone(),
        "constant": lambda value: torch.full(shape, value),
        "uniform": lambda bound: sample_uniform(-bound, bound),
        "normal": lambda std: torch.empty(shape).normal_(0.0, std, generator=generator),
        # softplus(log(expm1(dt))) = dt, so the bias alone gives steps of size dt
        "timesteps": lambda low, high: (
            sample_uniform(math.log(low), math.log(high)).exp().expm1().log()
        ),
        "log_uniform": lambda low, high: sample_uniform(low, high).log(),
        "log_counts": lambda: torch.arange(1.0, shape[-1] + 1).log().expand(shape).clone(),
        "alibi_softplus": lambda *numbers: _spread_slopes(shape, *numbers).expm1().log(),
        "alibi_log": lambda *numbers: _spread_slopes(shape, *numbers).log(),
        "alibi_sigmoid": lambda *numbers: -(16 * _spread_slopes(shape, *numbers)).expm1().log(),
    }

    if word not in makers:
        raise RegraftError(f"unknown initial value '{spec}': use one of {', '.join(makers)}")
    return makers[word](*values)


def _spread_slopes(shape: tuple[int, ...], heads: float, exponent: float) -> Float[Tensor, ...]:
    """ALiBi's slopes of the heads, each in an equal part of a tensor."""
    slopes = torch.tensor(alibi_slopes(int(heads), exponent))
    return slopes.repeat_interleave(math.prod(shape) // int(heads)).view(shape)
