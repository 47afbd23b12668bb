"""One tensor under expansions of its axes: copies placed, new entries zero, free, averaged or
turned.
"""

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

SAMPLE = 65536  # entries that a tensor's standard deviation is estimated from, in runs of RUN
RUN = 64
BLOCK = 1 << 18  # entries of noise that are drawn at a time


@dataclass(frozen=True)
class AxisGrowth:
    """How one axis of a tensor grows.

    `axis`: position in the tensor seen axis by axis. `reads`: the tensor reads this axis, so copies
    share. `fresh`: what coordinates that copy none hold: `zero`, `free` (random, as spread out as
    the tensor), `one`, `mean` (of the old coordinates, with `weights` when given) or `turn` (old
    ones turned by a random rotation of axis `turned`).
    """

    axis: int
    expansion: Expansion
    reads: bool = False
    fresh: Literal["zero", "free", "one", "mean", "turn"] = "zero"
    weights: Callable[[], Tensor] | None = None
    turned: int = -1


class SeededRandom:
    """Random numbers that depend on a seed and a name only."""

    def __init__(self, seed: int, name: str):
        key = zlib.crc32(name.encode())
        self.bits = np.random.Generator(np.random.SFC64([seed, key]))
        self.turns = np.random.Generator(np.random.SFC64([seed, key, 1]))

    def uniform(self, shape: Sequence[int], std: float, dtype: torch.dtype) -> Tensor:
        """Uniform, mean zero, standard deviation `std`: as good a start as a normal one and many
        times quicker.
        """
        count = math.prod(shape)
        words = self.bits.integers(0, 2**64 - 1, -(-count // 4), np.uint64, endpoint=True)
        raw = torch.from_numpy(words.view(np.int16)[:count])
        return raw.to(dtype).mul_(std * math.sqrt(3) / 32768).reshape(tuple(shape))

    def fill(self, out: Tensor, std: float) -> None:
        """`uniform` into a matrix (rows, entries), a block at a time."""
        for rows in out.split(max(1, BLOCK // max(1, out.shape[1]))):
            for block in rows.split(BLOCK, 1):
                block.copy_(self.uniform(block.shape, std, out.dtype))

    def rotation(self, size: int) -> Tensor:
        """A random orthogonal matrix (size, size), float64; their sequence does not depend on other
        draws.
        """
        q, r = np.linalg.qr(self.turns.standard_normal((size, size)))
        return torch.from_numpy(q * np.sign(np.diag(r)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def estimate_std(value: Tensor) -> float:
    """Standard deviation, from at most SAMPLE entries evenly spaced; 1 when there is none."""
    flat = value.reshape(-1)
    if flat.numel() > SAMPLE:  # runs of neighbours, for every far jump costs a page
        flat = flat[: flat.numel() // RUN * RUN].view(-1, RUN)[:: max(1, flat.numel() // SAMPLE)]
    std = float(flat.float().std()) if flat.numel() > 1 else 0.0
    return std or 1.0


def grow_tensor(
    value: Tensor,
    sides: Sequence[AxisGrowth],
    factor: float,
    draw: SeededRandom,
    noise: float = 0.0,
) -> Tensor:
    """`value` seen axis by axis -> its grown form, stored in the same dtype.

    Copies are multiplied by `factor` and, on axes that are read, by their share. `noise`: standard
    deviation, relative to the tensor's own, of noise that readers of copies add; it sums to zero
    over the copies, so nothing changes.
    """
    # Whether anything is computed at all: a tensor that is only padded stays in its own dtype, bit
    # for bit, and needs no float32 copy.
    noisy = [side for side in sides if noise and side.reads and side.expansion.copies != 1]
    shared = any(side.reads and not side.expansion.in_place for side in sides)
    computes = (
        factor != 1.0
        or shared
        or bool(noisy)
        or any(side.fresh in ("mean", "turn") for side in sides)
    )
    std = estimate_std(value) * abs(factor)
    out = value.to(compute_dtype(value.dtype)) * factor if computes else value

    # Axis after axis. Where old entries stay in front, all axes are extended in one allocation.
    if all(side.expansion.in_place and side.fresh != "turn" for side in sides):
        out = _place_old_first(out, sides)
        for side in sides:
            _fill_new_coordinates(out, side, std, draw)
    else:
        for side in sides:
            out = _extend_axis(out, side, draw)
            _fill_new_coordinates(out, side, std, draw)

    # Noise that sums to zero over the copies: readers tell them apart, the sum stays (L4).
    for side in noisy:
        flat = out.view(-1, *out.shape[side.axis :])
        for rows in flat.split(_rows_per_chunk(flat)):
            rows += _cancel_noise(
                draw.uniform(rows.shape, noise * std, out.dtype), replace(side, axis=1)
            )
    _apply_zeros_and_means(out, sides)
    return out.to(value.dtype)


def grow_moment(value: Tensor, sides: Sequence[AxisGrowth], factor: float, power: int) -> Tensor:
    """Adam's mean of gradients (`power` 1) or of their squares (2) of a tensor under the same
    growth.

    An old entry stored as c times itself has 1/c of its gradient; a copy that is written has its
    readers' share of it, a copy that is read has all of it. Where a query or key norm also runs
    over turned copies this holds approximately. New entries start with a mean of zero and the
    tensor's average square: an optimiser in its stride divides by it at once, and zero would make
    the first steps too long.
    """
    table = []
    for side in sides:
        expansion = replace(side.expansion, share=side.expansion.share**power, pairs=False)
        table.append(AxisGrowth(side.axis, expansion, not side.reads))
    out = grow_tensor(value, table, factor**-power, SeededRandom(0, ""))
    for side in table if power == 2 else ():
        if len(side.expansion.new_coordinates):
            out.index_fill_(
                side.axis, side.expansion.new_coordinates, float(value.mean()) * factor**-power
            )
    return out


def _place_old_first(value: Tensor, sides: Sequence[AxisGrowth]) -> Tensor:
    """Old values in front, on all axes at once; zeros behind where nothing else is filled in."""
    shape = list(value.shape)
    for side in sides:
        shape[side.axis] = side.expansion.new
    out = value.new_empty(shape)
    for side in sides:
        if side.fresh not in ("free", "one") and len(side.expansion.new_coordinates):
            out.narrow(
                side.axis, side.expansion.old, side.expansion.new - side.expansion.old
            ).zero_()
    out[tuple(slice(0, size) for size in value.shape)] = value
    return out


def _extend_axis(value: Tensor, side: AxisGrowth, draw: SeededRandom) -> Tensor:
    """One axis: copies with their shares, zeros or turned copies elsewhere."""
    expansion = side.expansion
    out = value.index_select(side.axis, expansion.index.clamp(min=0))
    shape = [-1 if axis == side.axis else 1 for axis in range(value.ndim)]
    if side.reads:
        out *= expansion.share.to(out.dtype).reshape(shape)
    fresh = expansion.new_coordinates
    if side.fresh == "turn":
        for begin in range(0, len(fresh), expansion.old):
            turn = draw.rotation(value.shape[side.turned]).to(out.dtype)
            turned = torch.tensordot(turn, value, ([1], [side.turned])).movedim(0, side.turned)
            out.index_copy_(side.axis, fresh[begin : begin + expansion.old], turned)
    elif len(fresh) and not side.reads:
        out.index_fill_(side.axis, fresh, 0)
    return out


def _fill_new_coordinates(out: Tensor, side: AxisGrowth, std: float, draw: SeededRandom) -> None:
    """New coordinates of one axis: random numbers or ones."""
    fresh = side.expansion.new_coordinates
    if not len(fresh):
        return
    if side.fresh == "one":
        out.index_fill_(side.axis, fresh, 1)
    elif side.fresh == "free":
        flat = out.view(-1, *out.shape[side.axis :])
        if int(fresh[-1]) - int(fresh[0]) + 1 == len(fresh):
            draw.fill(flat.narrow(1, int(fresh[0]), len(fresh)).flatten(1), std)
        else:
            shape = [flat.shape[0], len(fresh), *flat.shape[2:]]
            flat.index_copy_(1, fresh, draw.uniform(shape, std, out.dtype))

    # Pairs: the second unit equals the first where it reads and is its negative where it writes, so
    # that the two cancel (L1).
    if side.expansion.pairs:
        first, second = side.expansion.paired_coordinates()
        sign = -1 if side.reads else 1
        out.index_copy_(side.axis, second, sign * out.index_select(side.axis, first))
        if side.reads and len(fresh) % 2:
            out.index_fill_(side.axis, fresh[-1:], 0)


def _cancel_noise(noise: Tensor, side: AxisGrowth) -> Tensor:
    """N - N E R along an axis that is read: what copies hear of it sums to zero; new coordinates
    hear none.
    """
    expansion = side.expansion
    index = expansion.index.clamp(min=0)
    shape = [-1 if axis == side.axis else 1 for axis in range(noise.ndim)]
    noise = noise.index_fill_(side.axis, expansion.new_coordinates, 0)
    old = [expansion.old if axis == side.axis else size for axis, size in enumerate(noise.shape)]
    heard = noise.new_zeros(old).index_add_(side.axis, index, noise).index_select(side.axis, index)
    return noise.sub_(heard.mul_(expansion.share.to(noise.dtype).reshape(shape)))


def _rows_per_chunk(value: Tensor) -> int:
    """Rows that are worked on at a time, so that copies stay small."""
    return max(1, BLOCK // max(1, value[0].numel()))


def _apply_zeros_and_means(out: Tensor, sides: Sequence[AxisGrowth]) -> None:
    """Zeros win over what other axes filled in; averages come last."""
    for side in sides:
        if side.fresh == "zero" and len(side.expansion.new_coordinates) and len(sides) > 1:
            out.index_fill_(side.axis, side.expansion.new_coordinates, 0)
    for side in sides:
        fresh = side.expansion.new_coordinates
        if side.fresh == "mean" and len(fresh):
            old = out.narrow(side.axis, 0, side.expansion.old)
            if side.weights is not None:
                shape = [-1 if axis == side.axis else 1 for axis in range(out.ndim)]
                old = old * side.weights().to(out.dtype).reshape(shape)
            mean = old.mean(side.axis, keepdim=True)
            out.index_copy_(side.axis, fresh, mean.repeat_interleave(len(fresh), side.axis))
