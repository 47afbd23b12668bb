"""Named axes, the signature grammar over them, and expansions of one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RegraftError

AXES = frozenset(
    "vocab hidden ffn kv group dim depth pos one two three expert kernel type label pool channel"
    " patch".split()
)
TABLES = frozenset(("vocab", "pos", "type"))  # a map that reads one of them is looked up
UNITS = {"one": 1, "two": 2, "three": 3}
Axes = tuple[str, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Signature:
    """What a parameter is, over named axes.

    `kind` is map ("a b -> c d", stacked outputs "a -> b + c"), bias ("-> c"), gain of a norm ("gain
    hidden", or "1+gain hidden" stored minus one, `unit`), scale ("scale hidden": a factor per
    coordinate) or plain ("kv group dim dim": one dimension per axis, heads `kv group` being one).
    `inputs` is empty except for maps. A number is an axis of that size, which never grows.
    """

    text: str
    kind: Literal["map", "bias", "gain", "scale", "plain"]
    inputs: Axes
    outputs: tuple[Axes, ...]
    unit: bool = False

    def dims(self, stored: str = "out in") -> tuple[tuple[Axes, ...], ...]:
        """Per stored dimension, the axis products that are stacked along it."""
        if self.kind == "plain":
            return tuple((axes,) for axes in _join_head_axes(self.outputs[0]))
        if self.kind != "map":
            return (self.outputs,)
        return (
            (self.outputs, (self.inputs,)) if stored == "out in" else ((self.inputs,), self.outputs)
        )

    def shape(self, sizes: Sizes, stored: str = "out in") -> tuple[int, ...]:
        """The tensor's shape under axis sizes."""
        return tuple(sum(product(axes, sizes) for axes in stack) for stack in self.dims(stored))

    def piece(self, index: int) -> Signature:
        """Signature of the index-th of several fused maps: its own outputs, without the axis
        `three`.
        """
        outputs = self.outputs[index] if len(self.outputs) > 1 else self.outputs[0]
        return Signature(
            self.text, self.kind, self.inputs, (tuple(axis for axis in outputs if axis != "three"),)
        )


def _join_head_axes(axes: Axes) -> list[Axes]:
    dims: list[Axes] = []
    for axis in axes:
        if axis == "group" and dims[-1:] == [("kv",)]:
            dims[-1] = ("kv", "group")
        else:
            dims.append((axis,))
    return dims


def product(axes: Axes, sizes: Sizes) -> int:
    """Number of coordinates of a product of axes."""
    return math.prod(
        UNITS.get(axis) or (int(axis) if axis.isdigit() else sizes[axis]) for axis in axes
    )


@lru_cache
def parse_signature(text: str) -> Signature:
    """Parse a signature; RegraftError quotes it when an axis is unknown or nothing is left."""
    body, arrow, right = text.partition("->")
    head = body.split()
    unit = head[:1] == ["1+gain"]
    gain = unit or head[:1] in (["gain"], ["scale"])
    inputs = tuple(head[1:] if gain else head)
    outputs = tuple(tuple(part.split()) for part in right.split("+")) if arrow else (inputs,)
    if unknown := [
        axis for axes in (inputs, *outputs) for axis in axes if not (axis in AXES or axis.isdigit())
    ]:
        raise RegraftError(
            f"unknown axis '{unknown[0]}' in signature '{text}': use {', '.join(sorted(AXES))}"
        )
    if not all(outputs) or (gain and arrow):
        raise RegraftError(
            f"signature '{text}' names no output: write 'a b -> c d', '-> c', 'gain c' or 'a b c'"
        )
    if arrow:
        return Signature(text, "map" if inputs else "bias", inputs, outputs)
    kind: Literal["gain", "scale", "plain"] = (
        "plain" if not gain else "scale" if head[0] == "scale" else "gain"
    )
    return Signature(text, kind, (), outputs, unit)


@dataclass(frozen=True)
class Expansion:
    """(E, R) on one axis: E puts old coordinates into the new space, R reads them back, R @ E == I.

    `index`: for every new coordinate the old one it copies, -1 when it copies none. `share`: how
    much readers take of it, summing to one over the copies of an old coordinate. Of a coordinate
    that copies none, one side is `free` (its numbers do not matter: "writes" or "reads") and the
    other holds zeros, so that it does nothing and still learns. `pairs`: such coordinates come in
    twos that are written alike and read with opposite signs. `following`: values of further copies
    come from the next layer (AKI), which gives up exactness.
    """

    name: str
    old: int
    index: Tensor
    share: Tensor
    free: Literal["writes", "reads"] = "writes"
    pairs: bool = False
    following: bool = False

    @property
    def new(self) -> int:
        """Size of the new axis."""
        return len(self.index)

    @property
    def new_coordinates(self) -> Tensor:
        """Coordinates that copy none, (count,)."""
        return (self.index < 0).nonzero()[:, 0]

    @property
    def write_matrix(self) -> Tensor:
        """E as a matrix (new, old)."""
        return (self.index[:, None] == torch.arange(self.old)).double()

    @property
    def read_matrix(self) -> Tensor:
        """R as a matrix (old, new)."""
        return (self.write_matrix * self.share[:, None]).T

    @property
    def copies(self) -> int | None:
        """How many copies every old coordinate has, c in E^T E = c I; None when they differ."""
        counts = torch.bincount(self.index[self.index >= 0], minlength=self.old)
        return int(counts[0]) if bool((counts == counts[0]).all()) else None

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.new == self.old and self.starts_with_old

    @property
    def starts_with_old(self) -> bool:
        """Whether the old coordinates come first, in order."""
        return bool((self.index[: self.old] == torch.arange(self.old)).all())

    @property
    def in_place(self) -> bool:
        """Whether old coordinates keep their places and each has one copy."""
        return self.copies == 1 and self.starts_with_old

    def paired_coordinates(self) -> tuple[Tensor, Tensor]:
        """First and second members of the pairs; both empty without `pairs`."""
        fresh = self.new_coordinates if self.pairs else self.new_coordinates[:0]
        half = len(fresh) // 2
        return fresh[:half], fresh[half : 2 * half]


def build_expansion(
    name: str, old: int, index: Tensor, share: Tensor | None = None, **fields: Any
) -> Expansion:
    """The expansion of an index map; without `share` every copy is read as much as the others."""
    if share is None:
        counts = torch.bincount(index[index >= 0], minlength=old).double()
        share = torch.where(index < 0, 0.0, 1 / counts[index.clamp(min=0)])
    return Expansion(name, old, index, share, **fields)


def identity(size: int) -> Expansion:
    """The axis stays as it is."""
    return build_expansion("identity", size, torch.arange(size))


def pad(
    old: int, new: int, free: Literal["writes", "reads"] = "writes", pairs: bool = False
) -> Expansion:
    """New coordinates behind the old ones that do nothing yet (composable expansions, arXiv
    2308.06103).
    """
    _check_grows("pad", old, new)
    index = torch.cat([torch.arange(old), torch.full((new - old,), -1)])
    return build_expansion("pad", old, index, free=free, pairs=pairs)


def place(old: int, new: int, index: Tensor) -> Expansion:
    """Old coordinate i goes to `index[i]`; the others are new."""
    _check_grows("place", old, new)
    back = torch.full((new,), -1)
    back[index] = torch.arange(old)
    return build_expansion("place", old, back)


def repeat(old: int, times: int) -> Expansion:
    """Each coordinate `times` times in a row: how grouped key/value heads serve their queries
    (arXiv 2305.13245).
    """
    return build_expansion(
        "repeat", old, torch.arange(old).repeat_interleave(_check_times("repeat", times))
    )


def tile(old: int, new: int) -> Expansion:
    """The whole axis several times, one copy after the other (HyperCloning, arXiv 2409.12903)."""
    if new < old or new % old:
        near = sorted({max(new // old, 1) * old, -(-max(new, 1) // old) * old})
        raise RegraftError(
            f"tile makes whole copies: {new} is no multiple of {old}; use"
            f" {' or '.join(map(str, near))}, or --width-init lemon"
        )
    return build_expansion("tile", old, torch.arange(old).repeat(new // old))


def duplicate(old: int, new: int, seed: int = 0, following: bool = False) -> Expansion:
    """All old coordinates once, then copies drawn at random, shared evenly (Net2Net, arXiv
    1511.05641; bert2BERT's function-preserving initialisation, arXiv 2110.07143; with `following`
    its advanced knowledge initialisation).
    """
    _check_grows("duplicate", old, new)
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(old, generator=generator) for _ in range(-(-(new - old) // old))]
    index = torch.cat([torch.arange(old), *rounds])[:new]
    return build_expansion("duplicate", old, index, following=following)


def split(old: int, new: int, seed: int = 0) -> Expansion:
    """Old coordinates copied in turn, shared unevenly so that copies separate (LEMON, arXiv
    2310.07999: circular copies with unequal fan-out).
    """
    _check_grows("split", old, new)
    index = torch.arange(new) % old
    weight = 0.5 + torch.rand(
        new, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    total = torch.zeros(old, dtype=torch.float64).index_add(0, index, weight)
    return build_expansion("split", old, index, weight / total[index])


def rounds(old: int, new: int, free: Literal["writes", "reads"] = "reads") -> Expansion:
    """As many whole copies as fit, then new coordinates that hold nothing (LEMON on the residual
    stream).
    """
    _check_grows("rounds", old, new)
    index = torch.cat([torch.arange(old).repeat(new // old), torch.full((new % old,), -1)])
    return build_expansion("rounds", old, index, free=free)


def _check_grows(name: str, old: int, new: int) -> None:
    if new < old:
        raise RegraftError(
            f"{name} cannot shrink an axis from {old} to {new}: give a size of at least {old}"
        )


def _check_times(name: str, times: int) -> int:
    if times < 1:
        raise RegraftError(f"{name} needs at least one copy, got {times}: give times >= 1")
    return times


def broadcast_axes(value: Tensor, source: Axes, target: Axes, sizes: Sizes) -> Tensor:
    """Broadcast the leading dimension of `value` over the axes of `target` that `source` lacks.

    value: (product of source, ...) -> (product of target, ...). For 'kv dim' -> 'kv group dim'
    every key/value head is repeated for its queries, head by head: `repeat` on the missing axis of
    size one. RegraftError when axes of `source` have nowhere to go or change order.
    """
    if tuple(axis for axis in target if axis in source) != source:
        missing = [axis for axis in source if axis not in target] or list(source)
        raise RegraftError(
            f"cannot inherit '{' '.join(target)}' from '{' '.join(source)}': axes {missing} have"
            " nowhere to go"
        )
    rest = value.shape[1:]
    value = value.reshape(*[sizes[axis] if axis in source else 1 for axis in target], *rest)
    for index, axis in enumerate(target):
        if axis not in source:
            value = value.repeat_interleave(sizes[axis], index)
    return value.reshape(product(target, sizes), *rest)
