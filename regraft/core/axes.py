"""Named axes, the signature grammar over them, and expansions of one axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RegraftError

AXES = frozenset(
    (
        "vocab hidden ffn inner dense_ffn shared_ffn routed_ffn kv group dim depth pos place "
        "one two three expert kernel type label pool channel patch register bucket key_head "
        "key_dim value_group value_dim ssm_head ssm_dim ssm_group ssm_state ssm_conv tap embed "
        "task encoder_depth mel latent query_latent rope value"
    ).split()
)
# What names of axes begin with that belong to a stack beside the one that grows.
BESIDE = ("decoder_", "vision_")
# A map from one of these is a table of embeddings.
TABLES = frozenset(("vocab", "pos", "place", "type", "task", "bucket"))
UNITS = {"one": 1, "two": 2, "three": 3}  # axes whose size is their name
INTERLEAVED = ("two", "three")  # in a fused tensor: which of the maps, which alternate row by row
Axes = tuple[str, ...]  # a product of axes: ("kv", "dim") has kv * dim coordinates
Sizes = Mapping[str, int]  # axis -> number of coordinates


def bare_axis(axis: str) -> str:
    """The name of an axis without the stack that it belongs to (`BESIDE`)."""
    return next((axis.removeprefix(one) for one in BESIDE if axis.startswith(one)), axis)


@dataclass(frozen=True)
class Signature:
    """What a parameter computes, over named axes.

    | text                     | kind  | meaning                                              |
    |--------------------------|-------|------------------------------------------------------|
    | "hidden -> kv group dim" | map   | a matrix or table; its outputs are heads times dim   |
    | "hidden -> ffn + ffn"    | map   | several maps of the same input, stacked              |
    | "-> kv dim"              | bias  | added to the output of a map                         |
    | "gain hidden"            | gain  | a norm's factors                                     |
    | "1+gain hidden"          | gain  | the same, stored minus one (`unit`)                  |
    | "scale hidden"           | scale | a factor per coordinate                              |
    | "scalar"                 | scale | one number, without a dimension                      |
    | "kv group dim dim"       | plain | a tensor with a dimension per axis; heads are one    |

    A number in a signature is an axis of that size, which never grows.
    """

    # The signature as written.
    text: str
    # See the table above.
    kind: Literal["map", "bias", "gain", "scale", "plain"]
    # Axes before the arrow; empty except for maps.
    inputs: Axes
    # Products of axes after the arrow, one per stacked map.
    outputs: tuple[Axes, ...]
    # Whether a gain is stored minus one.
    unit: bool = False

    def dims(self, stored: str = "out in") -> tuple[tuple[Axes, ...], ...]:
        """For each stored dimension, the axis products that are stacked along it.

        Args:
            stored: order of a map's dimensions, "out in" or "in out". With "expert" before it the
                outputs begin with that axis, which has a dimension of its own. In a filter ("out
                in tap") every input axis has one.
        """
        if self.kind == "plain":
            return tuple((axes,) for axes in _join_head_axes(self.outputs[0]))
        if stored.startswith("expert "):
            each = replace(self, outputs=tuple(axes[1:] for axes in self.outputs))
            return ((("expert",),), *each.dims(stored.removeprefix("expert ")))
        if self.outputs == ((),):
            return ()
        if self.kind != "map":
            return (self.outputs,)
        if stored == "out in tap":
            return (self.outputs, *(((axis,),) for axis in self.inputs))
        if stored == "out in":
            return (self.outputs, (self.inputs,))
        return ((self.inputs,), self.outputs)

    def shape(self, sizes: Sizes, stored: str = "out in") -> tuple[int, ...]:
        """The stored tensor's shape for these axis sizes."""
        return tuple(sum(product(axes, sizes) for axes in stack) for stack in self.dims(stored))

    def piece(self, index: int) -> Signature:
        """Signature of the index-th of several fused maps (see `fused`)."""
        # Stacked maps have an output each; interleaved ones share theirs, with an axis that counts
        # them.
        outputs = self.outputs[index] if len(self.outputs) > 1 else self.outputs[0]
        own = tuple(axis for axis in outputs if axis not in INTERLEAVED)
        return Signature(self.text, self.kind, self.inputs, (own,))


def _join_head_axes(axes: Axes) -> list[Axes]:
    """One product per axis, except that "kv group" is one dimension: the query heads."""
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
    """Parse a signature.

    RegraftError, quoting it, when an axis is unknown or it names no output.
    """
    if text == "scalar":
        return Signature(text, "scale", (), ((),))
    body, arrow, right = text.partition("->")
    left = body.split()
    unit = left[:1] == ["1+gain"]
    per_coordinate = unit or left[:1] in (["gain"], ["scale"])  # a word, then the axes

    inputs = tuple(left[1:] if per_coordinate else left)
    outputs = tuple(tuple(part.split()) for part in right.split("+")) if arrow else (inputs,)

    _check_axes(text, (inputs, *outputs))
    if not all(outputs) or (per_coordinate and arrow):
        raise RegraftError(
            f"signature '{text}' names no output: write 'a b -> c d', '-> c', 'gain c' or 'a b c'"
        )

    if arrow:
        return Signature(text, "map" if inputs else "bias", inputs, outputs)
    if not per_coordinate:
        return Signature(text, "plain", (), outputs)
    return Signature(text, "scale" if left[0] == "scale" else "gain", (), outputs, unit)


def _check_axes(text: str, groups: Iterable[Sequence[str]]) -> None:
    """RegraftError, quoting the signature `text`, when a name in `groups` is no axis."""
    for axis in itertools.chain(*groups):
        if not (bare_axis(axis) in AXES or axis.isdigit()):
            raise RegraftError(
                f"unknown axis '{axis}' in signature '{text}': use {', '.join(sorted(AXES))}"
            )


@dataclass(frozen=True)
class Expansion:
    """How one axis grows: the pair (E, R) of docs/concepts/expansions.md.

    E (new, old) writes old coordinates into the larger space, R (old, new) reads them back, and
    R E = I, so that a reader behind the larger space gets what it got before. Each new coordinate
    copies one old coordinate, or none. Of a coordinate that copies none, one side is free to hold
    any numbers and the other holds zeros: it changes nothing, and it can still learn.
    """

    # Name of the operator that built it, such as "tile".
    name: str
    # Size of the axis before growth.
    old: int
    # For each new coordinate the old one that it copies, or -1: (new,), integers.
    index: Tensor
    # How much of each new coordinate readers take: (new,). Sums to one over the copies of an old
    # coordinate.
    share: Tensor
    # Which side of coordinates that copy none is free: what "writes" them or what "reads" them.
    free: Literal["writes", "reads"] = "writes"
    # Coordinates that copy none come in twos, written alike and read with opposite signs, so that
    # the two cancel.
    pairs: bool = False
    # Further copies take their values from the next layer (bert2BERT's AKI); this is not exact.
    following: bool = False

    @property
    def new(self) -> int:
        """Size of the new axis."""
        return len(self.index)

    @property
    def new_coordinates(self) -> Tensor:
        """Coordinates that copy none: (count,), integers."""
        return (self.index < 0).nonzero()[:, 0]

    @property
    def write_matrix(self) -> Tensor:
        """E: (new, old), ones and zeros."""
        return (self.index[:, None] == torch.arange(self.old)).double()

    @property
    def read_matrix(self) -> Tensor:
        """R: (old, new), the shares in place of E's ones."""
        return (self.write_matrix * self.share[:, None]).T

    @property
    def copies(self) -> int | None:
        """How many copies each old coordinate has; None when the counts differ.

        It is c in E^T E = c I. Only when it is the same for all does a norm stay exact.
        """
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
        """Whether old coordinates keep their positions and have no further copies."""
        return self.copies == 1 and self.starts_with_old

    def paired_coordinates(self) -> tuple[Tensor, Tensor]:
        """First and second members of the pairs: (pairs,) each, empty without `pairs`."""
        added = self.new_coordinates if self.pairs else self.new_coordinates[:0]
        half = len(added) // 2
        return added[:half], added[half : 2 * half]  # an odd one out has no partner


def build_expansion(
    name: str, old: int, index: Tensor, share: Tensor | None = None, **fields: Any
) -> Expansion:
    """An expansion from the old coordinate of each new one.

    Args:
        name: name of the operator.
        old: size of the axis before growth.
        index: for each new coordinate the old one that it copies, or -1: (new,).
        share: how much of each is read: (new,). None: copies of a coordinate share evenly.
        fields: further fields of `Expansion`.
    """
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
    """New coordinates behind the old ones that do nothing yet.

    This is what composable expansions (arXiv 2308.06103) do.
    """
    _check_grows("pad", old, new)
    index = torch.cat([torch.arange(old), torch.full((new - old,), -1)])
    return build_expansion("pad", old, index, free=free, pairs=pairs)


def place(old: int, new: int, index: Tensor) -> Expansion:
    """Old coordinate i moves to `index[i]`; the other coordinates are new and copy none."""
    _check_grows("place", old, new)
    copied = torch.full((new,), -1)
    copied[index] = torch.arange(old)
    return build_expansion("place", old, copied)


def repeat(old: int, times: int) -> Expansion:
    """Each coordinate `times` times in a row.

    Grouped key/value heads serve their queries this way (arXiv 2305.13245).
    """
    if times < 1:
        raise RegraftError(f"repeat needs at least one copy, got {times}: give times >= 1")
    return build_expansion("repeat", old, torch.arange(old).repeat_interleave(times))


def tile(old: int, new: int) -> Expansion:
    """The whole axis several times, one copy after the other (HyperCloning, arXiv 2409.12903).

    RegraftError when `new` is not a multiple of `old`.
    """
    if new < old or new % old:
        near = sorted({max(new // old, 1) * old, -(-max(new, 1) // old) * old})
        raise RegraftError(
            f"tile makes whole copies: {new} is no multiple of {old}; "
            f"use {' or '.join(map(str, near))}, or --width-init lemon"
        )
    return build_expansion("tile", old, torch.arange(old).repeat(new // old))


def duplicate(old: int, new: int, seed: int = 0, following: bool = False) -> Expansion:
    """All old coordinates once, then copies of random ones; copies share evenly.

    Net2Net (arXiv 1511.05641) and bert2BERT's function-preserving initialisation (FPI, arXiv
    2110.07143); with `following` bert2BERT's advanced knowledge initialisation (AKI).
    """
    _check_grows("duplicate", old, new)
    generator = torch.Generator().manual_seed(seed)
    # Whole permutations, cut at the end, so that no coordinate gets two more copies than another.
    shuffles = [torch.randperm(old, generator=generator) for _ in range(-(-(new - old) // old))]
    index = torch.cat([torch.arange(old), *shuffles])[:new]
    return build_expansion("duplicate", old, index, following=following)


def split(old: int, new: int, seed: int = 0) -> Expansion:
    """Old coordinates copied in turn, with uneven shares (LEMON, arXiv 2310.07999).

    Copies that are read unevenly get different gradients, so that training separates them.
    """
    _check_grows("split", old, new)
    index = torch.arange(new) % old

    # Weights in (0.5, 1.5) before normalization: no copy is read with a share near zero.
    weight = 0.5 + torch.rand(
        new, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    total = torch.zeros(old, dtype=torch.float64).index_add(0, index, weight)
    return build_expansion("split", old, index, weight / total[index])


def rounds(old: int, new: int, free: Literal["writes", "reads"] = "reads") -> Expansion:
    """As many whole copies as fit, then coordinates that copy none.

    LEMON (arXiv 2310.07999) grows the residual stream this way.
    """
    _check_grows("rounds", old, new)
    index = torch.cat([torch.arange(old).repeat(new // old), torch.full((new % old,), -1)])
    return build_expansion("rounds", old, index, free=free)


def _check_grows(name: str, old: int, new: int) -> None:
    if new < old:
        raise RegraftError(
            f"{name} cannot shrink an axis from {old} to {new}: give a size of at least {old}"
        )


def broadcast_axes(value: Tensor, source: Axes, target: Axes, sizes: Sizes) -> Tensor:
    """Broadcast the first dimension of `value` over axes of `target` that `source` lacks.

    Args:
        value: (product of `source`, ...).
        source: axes of the first dimension.
        target: the same axes in the same order, with others between. From "kv dim" to
            "kv group dim" each key/value head is repeated for its queries, as `repeat` does.
        sizes: axis sizes.

    Returns:
        (product of `target`, ...).

    RegraftError when `target` lacks axes of `source` or has them in another order.
    """
    if tuple(axis for axis in target if axis in source) != source:
        missing = [axis for axis in source if axis not in target] or list(source)
        raise RegraftError(
            f"cannot inherit '{' '.join(target)}' from '{' '.join(source)}': "
            f"axes {missing} have nowhere to go"
        )

    # A dimension per axis of `target`, of size one where `source` lacks it. Repeat along those.
    rest = value.shape[1:]
    value = value.reshape(*[sizes[axis] if axis in source else 1 for axis in target], *rest)
    for index, axis in enumerate(target):
        if axis not in source:
            value = value.repeat_interleave(sizes[axis], index)
    return value.reshape(product(target, sizes), *rest)
