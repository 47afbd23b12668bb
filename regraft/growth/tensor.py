"""One tensor under expansions of its axes: where old entries go and what new entries hold."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.axes import Expansion
from ..core.shapes import Float

SAMPLE = 65536  # entries that a tensor's standard deviation is estimated from, in runs of RUN
RUN = 64
BLOCK = 1 << 18  # entries of noise that are drawn at a time

# What new coordinates of an axis hold: zeros, random numbers with the tensor's standard deviation,
# ones, the mean of the old coordinates, or old ones under a random rotation.
Init = Literal["zero", "random", "one", "mean", "rotate"]


@dataclass(frozen=True)
class AxisGrowth:
    """How one axis of a tensor grows."""

    axis: int  # position in the tensor, which has one dimension per axis
    expansion: Expansion
    reads: bool = False  # the tensor reads this axis, so copies share what they give
    init: Init = "zero"  # what coordinates that copy none hold
    # Factors of the old coordinates, (old,), that `mean` averages them with; None: plain mean.
    mean_weights: Callable[[], Float[Tensor, " old"]] | None = None
    rotated_axis: int = -1  # the axis that `rotate` rotates


class SeededRandom:
    """Random numbers that depend on a seed and a name only, not on the order of reading."""

    def __init__(self, seed: int, name: str):
        key = zlib.crc32(name.encode())
        self.bits = np.random.Generator(np.random.SFC64([seed, key]))
        self.rotations = np.random.Generator(np.random.SFC64([seed, key, 1]))

    def uniform(
        self, shape: Sequence[int], std: float, dtype: torch.dtype
    ) -> Float[Tensor, "*shape"]:
        """Uniform numbers of mean zero and standard deviation `std`.

        As good a start as normal ones and many times quicker to draw.
        """
        # 16 random bits a number: four numbers from every word of the generator. A uniform variable
        # on [-a, a] has standard deviation a / sqrt(3).
        count = math.prod(shape)
        words = self.bits.integers(0, 2**64 - 1, -(-count // 4), np.uint64, endpoint=True)
        raw = torch.from_numpy(words.view(np.int16)[:count])
        return raw.to(dtype).mul_(std * math.sqrt(3) / 32768).reshape(tuple(shape))

    def fill(self, out: Float[Tensor, "rows entries"], std: float) -> None:
        """Write `uniform` numbers into a matrix, a block at a time to keep memory small."""
        for rows in out.split(max(1, BLOCK // max(1, out.shape[1]))):
            for block in rows.split(BLOCK, 1):
                block.copy_(self.uniform(block.shape, std, out.dtype))

    def rotation(self, size: int) -> Float[Tensor, "size size"]:
        """A random orthogonal matrix, float64; the sequence does not depend on other draws."""
        # The signs make the distribution uniform over all orthogonal matrices.
        q, r = np.linalg.qr(self.rotations.standard_normal((size, size)))
        return torch.from_numpy(q * np.sign(np.diag(r)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def estimate_std(value: Float[Tensor, "*shape"]) -> float:
    """Standard deviation, from at most SAMPLE entries evenly spaced; 1 when it is zero."""
    flat = value.reshape(-1)
    if flat.numel() > SAMPLE:
        # Runs of neighbours instead of single entries: every far jump reads a page from disk.
        flat = flat[: flat.numel() // RUN * RUN].view(-1, RUN)[:: max(1, flat.numel() // SAMPLE)]
    std = float(flat.float().std()) if flat.numel() > 1 else 0.0
    return std or 1.0


def grow_tensor(
    value: Float[Tensor, "*old"],
    growths: Sequence[AxisGrowth],
    factor: float,
    random: SeededRandom,
    noise: float = 0.0,
) -> Float[Tensor, "*new"]:
    """The grown form of a tensor, in the same dtype.

    Args:
        value: the tensor with one dimension per axis.
        growths: the axes that grow.
        factor: multiplies old entries and their copies; copies on axes that are read are also
            multiplied by their share.
        random: source of new random entries.
        noise: standard deviation, relative to the tensor's own, of noise that readers of copies
            add. It sums to zero over the copies of a coordinate, so the function stays.
    """
    noisy = [growth for growth in growths if noise and growth.reads and _has_copies(growth)]
    std = estimate_std(value) * abs(factor)

    # A tensor that is only padded is not computed with: it stays in its own dtype, bit for bit, and
    # needs no float32 copy.
    computed = factor != 1.0 or bool(noisy) or any(map(_needs_arithmetic, growths))
    out = value.to(compute_dtype(value.dtype)) * factor if computed else value

    # Where old entries stay in front, one allocation serves all axes; else axis after axis.
    if all(growth.expansion.in_place and growth.init != "rotate" for growth in growths):
        out = _place_old_first(out, growths)
        for growth in growths:
            _fill_new_coordinates(out, growth, std, random)
    else:
        for growth in growths:
            out = _extend_axis(out, growth, random)
            _fill_new_coordinates(out, growth, std, random)

    for growth in noisy:
        _add_cancelling_noise(out, growth, noise * std, random)
    _apply_zeros_and_means(out, growths)
    return out.to(value.dtype)


def _has_copies(growth: AxisGrowth) -> bool:
    """Whether some old coordinate of the axis has more than one copy."""
    return growth.expansion.copies != 1


def _needs_arithmetic(growth: AxisGrowth) -> bool:
    """Whether an axis changes old values or averages them: shares of copies, means, rotations."""
    shared = growth.reads and not growth.expansion.in_place
    return shared or growth.init in ("mean", "rotate")


def grow_moment(
    value: Float[Tensor, "*old"], growths: Sequence[AxisGrowth], factor: float, power: int
) -> Float[Tensor, "*new"]:
    """Adam's running mean of a tensor's gradients, or of their squares, under the same growth.

    docs/concepts/expansions.md, section 7. Where a query or key norm also runs over rotated copies
    this holds approximately.

    Args:
        value: the moment with one dimension per axis.
        growths: the axes of the weight that grow.
        factor: what old entries of the weight are multiplied by.
        power: 1 for `exp_avg`, 2 for `exp_avg_sq`.
    """
    # Gradients scale inversely: a weight stored as c times itself has 1/c of its gradient. Reading
    # and writing change places: a copy that is written gets its readers' share of the gradient, a
    # copy that is read gets all of it.
    growths_of_moment = []
    for growth in growths:
        expansion = replace(growth.expansion, share=growth.expansion.share**power, pairs=False)
        growths_of_moment.append(AxisGrowth(growth.axis, expansion, not growth.reads))
    out = grow_tensor(value, growths_of_moment, factor**-power, SeededRandom(0, ""))

    # New entries start with the tensor's mean square: Adam late in training corrects no bias, and
    # dividing by zero moments would make the first steps far too long.
    if power == 2:
        mean_square = float(value.mean()) * factor**-power
        for growth in growths_of_moment:
            new = growth.expansion.new_coordinates
            if len(new):
                out.index_fill_(growth.axis, new, mean_square)
    return out


def _place_old_first(
    value: Float[Tensor, "*old"], growths: Sequence[AxisGrowth]
) -> Float[Tensor, "*new"]:
    """Old values in front, on all axes at once; zeros behind where nothing else is filled in."""
    shape = list(value.shape)
    for growth in growths:
        shape[growth.axis] = growth.expansion.new
    out = value.new_empty(shape)

    for growth in growths:
        expansion = growth.expansion
        if growth.init not in ("random", "one") and len(expansion.new_coordinates):
            out.narrow(growth.axis, expansion.old, expansion.new - expansion.old).zero_()
    out[tuple(slice(0, size) for size in value.shape)] = value
    return out


def _extend_axis(
    value: Float[Tensor, "*old"], growth: AxisGrowth, random: SeededRandom
) -> Float[Tensor, "*new"]:
    """One axis: copies with their shares, zeros or rotated copies elsewhere."""
    expansion, axis = growth.expansion, growth.axis
    # New coordinates have index -1; they take any value here and are overwritten.
    out = value.index_select(axis, expansion.index.clamp(min=0))
    if growth.reads:
        out *= _along_axis(expansion.share.to(out.dtype), axis, out.ndim)

    new = expansion.new_coordinates
    if growth.init == "rotate":
        # One rotation for each further copy of the axis, so that no two copies are alike.
        inner = growth.rotated_axis
        for start in range(0, len(new), expansion.old):
            rotation = random.rotation(value.shape[inner]).to(out.dtype)
            rotated = torch.tensordot(rotation, value, ([1], [inner])).movedim(0, inner)
            out.index_copy_(axis, new[start : start + expansion.old], rotated)
    elif len(new) and not growth.reads:
        out.index_fill_(axis, new, 0)
    return out


def _fill_new_coordinates(
    out: Float[Tensor, "*axes"], growth: AxisGrowth, std: float, random: SeededRandom
) -> None:
    """New coordinates of one axis: random numbers or ones."""
    new, axis = growth.expansion.new_coordinates, growth.axis
    if not len(new):
        return
    if growth.init == "one":
        out.index_fill_(axis, new, 1)
    elif growth.init == "random":
        flat = out.view(-1, *out.shape[axis:])  # (outer, axis, inner axes)
        first, last = int(new[0]), int(new[-1])
        if last - first + 1 == len(new):
            random.fill(flat.narrow(1, first, len(new)).flatten(1), std)
        else:
            shape = [flat.shape[0], len(new), *flat.shape[2:]]
            flat.index_copy_(1, new, random.uniform(shape, std, out.dtype))
    _copy_pairs(out, growth)


def _copy_pairs(out: Float[Tensor, "*axes"], growth: AxisGrowth) -> None:
    """Second units of pairs: written like the first and read with the opposite sign (L1)."""
    if not growth.expansion.pairs:
        return
    first, second = growth.expansion.paired_coordinates()
    sign = -1 if growth.reads else 1
    out.index_copy_(growth.axis, second, sign * out.index_select(growth.axis, first))

    # A last unit without a partner has nothing that cancels it.
    new = growth.expansion.new_coordinates
    if growth.reads and len(new) % 2:
        out.index_fill_(growth.axis, new[-1:], 0)


def _add_cancelling_noise(
    out: Float[Tensor, "*axes"], growth: AxisGrowth, std: float, random: SeededRandom
) -> None:
    """Noise that tells the copies of a coordinate apart and sums to zero over them (L4)."""
    flat = out.view(-1, *out.shape[growth.axis :])  # (outer, axis, inner axes)
    for rows in flat.split(_rows_per_chunk(flat)):
        noise = random.uniform(rows.shape, std, out.dtype)
        rows += _cancel_noise(noise, replace(growth, axis=1))


def _cancel_noise(noise: Float[Tensor, "*axes"], growth: AxisGrowth) -> Float[Tensor, "*axes"]:
    """N - N E R on an axis that is read: times E it is zero. New coordinates get no noise."""
    expansion, axis = growth.expansion, growth.axis
    index = expansion.index.clamp(min=0)
    noise = noise.index_fill_(axis, expansion.new_coordinates, 0)

    # What an old coordinate gets of the noise over all its copies is taken off them by their share.
    old_shape = list(noise.shape)
    old_shape[axis] = expansion.old
    total = noise.new_zeros(old_shape).index_add_(axis, index, noise).index_select(axis, index)
    return noise.sub_(total.mul_(_along_axis(expansion.share.to(noise.dtype), axis, noise.ndim)))


def _along_axis(vector: Float[Tensor, " size"], axis: int, ndim: int) -> Float[Tensor, "*axes"]:
    """A vector that broadcasts along one of `ndim` axes."""
    return vector.reshape([-1 if position == axis else 1 for position in range(ndim)])


def _rows_per_chunk(value: Float[Tensor, "rows ..."]) -> int:
    """Rows to compute at a time, so that temporary tensors stay small."""
    return max(1, BLOCK // max(1, value[0].numel()))


def _apply_zeros_and_means(out: Float[Tensor, "*axes"], growths: Sequence[AxisGrowth]) -> None:
    """Zeros and means over what other axes filled in."""
    # Where two axes meet, zeros win: an entry that must do nothing on one axis does nothing.
    for growth in growths:
        new = growth.expansion.new_coordinates
        if growth.init == "zero" and len(new) and len(growths) > 1:
            out.index_fill_(growth.axis, new, 0)

    # Means come last: they average what the old coordinates hold in the end.
    for growth in growths:
        new = growth.expansion.new_coordinates
        if growth.init == "mean" and len(new):
            old = out.narrow(growth.axis, 0, growth.expansion.old)
            if growth.mean_weights is not None:
                weights = growth.mean_weights().to(out.dtype)
                old = old * _along_axis(weights, growth.axis, out.ndim)
            mean = old.mean(growth.axis, keepdim=True)
            out.index_copy_(growth.axis, new, mean.repeat_interleave(len(new), growth.axis))
