"""Named axes, the signature grammar over them, and expansions of one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .errors import RegraftError

AXES = frozenset("vocab hidden ffn kv group dim depth pos three expert kernel".split())
Axes = tuple[str, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Signature:
    """What a parameter is, over named axes.

    `kind` is map ("a b -> c d", stacked outputs "a -> b + c"), bias ("-> c"), gain ("gain hidden", or "1+gain hidden"
    stored minus one, `unit`) or plain ("kv group dim dim": one
    dimension per axis, heads `kv group` being one). `inputs` is empty except for maps.
    """

    text: str
    kind: Literal["map", "bias", "gain", "plain"]
    inputs: Axes
    outputs: tuple[Axes, ...]
    unit: bool = False

    def dims(self, stored: str = "out in") -> tuple[tuple[Axes, ...], ...]:
        """Per stored dimension, the axis products that are stacked along it."""
        if self.kind == "plain":
            return tuple((axes,) for axes in _heads_together(self.outputs[0]))
        if self.kind != "map":
            return (self.outputs,)
        return (self.outputs, (self.inputs,)) if stored == "out in" else ((self.inputs,), self.outputs)

    def shape(self, sizes: Sizes, stored: str = "out in") -> tuple[int, ...]:
        """The tensor's shape under axis sizes."""
        return tuple(sum(product(axes, sizes) for axes in stack) for stack in self.dims(stored))

    def piece(self, index: int) -> Signature:
        """Signature of the index-th of several fused maps: its own outputs, without the axis `three`."""
        outputs = self.outputs[index] if len(self.outputs) > 1 else self.outputs[0]
        return Signature(self.text, self.kind, self.inputs, (tuple(axis for axis in outputs if axis != "three"),))


def _heads_together(axes: Axes) -> list[Axes]:
    dims: list[Axes] = []
    for axis in axes:
        if axis == "group" and dims[-1:] == [("kv",)]:
            dims[-1] = ("kv", "group")
        else:
            dims.append((axis,))
    return dims


def product(axes: Axes, sizes: Sizes) -> int:
    """Number of coordinates of a product of axes."""
    return math.prod(3 if axis == "three" else sizes[axis] for axis in axes)


@lru_cache
def signature(text: str) -> Signature:
    """Parse a signature; RegraftError quotes it when an axis is unknown or nothing is left."""
    body, arrow, right = text.partition("->")
    head = body.split()
    unit = head[:1] == ["1+gain"]
    gain = unit or head[:1] == ["gain"]
    inputs = tuple(head[1:] if gain else head)
    outputs = tuple(tuple(part.split()) for part in right.split("+")) if arrow else (inputs,)
    if unknown := [axis for axes in (inputs, *outputs) for axis in axes if axis not in AXES]:
        raise RegraftError(f"unknown axis '{unknown[0]}' in signature '{text}': use {', '.join(sorted(AXES))}")
    if not all(outputs) or (gain and arrow):
        raise RegraftError(f"signature '{text}' names no output: write 'a b -> c d', '-> c', 'gain c' or 'a b c'")
    if arrow:
        return Signature(text, "map" if inputs else "bias", inputs, outputs)
    return Signature(text, "gain" if gain else "plain", (), outputs, unit)


@dataclass(frozen=True)
class Expansion:
    """(E, R) on one axis: `embed` (new, old) puts old coordinates into the new space, `read` (old, new) back.

    The law is R @ E == I. `energy` is c with E^T E = c I, or None when there is no such c.
    """

    name: str
    embed: Tensor
    read: Tensor

    @property
    def energy(self) -> float | None:
        """c with E^T E = c I, so that norms over the axis scale by sqrt(c)."""
        gram = self.embed.T @ self.embed
        c = float(gram[0, 0])
        return c if torch.allclose(gram, c * torch.eye(len(gram), dtype=gram.dtype)) else None


def identity(size: int) -> Expansion:
    """The axis stays as it is."""
    return Expansion("identity", torch.eye(size), torch.eye(size))


def pad(old: int, new: int) -> Expansion:
    """Zeros behind the old coordinates (composable expansions, arXiv 2308.06103)."""
    _grows("pad", old, new)
    return Expansion("pad", torch.eye(new, old), torch.eye(old, new))


def repeat(old: int, times: int) -> Expansion:
    """Each coordinate `times` times in a row: how grouped key/value heads serve their queries (arXiv 2305.13245)."""
    embed = torch.eye(old).repeat_interleave(_times("repeat", times), 0)
    return Expansion("repeat", embed, embed.T / times)


def tile(old: int, times: int) -> Expansion:
    """The whole axis `times` times, one copy after the other (HyperCloning, arXiv 2409.12903)."""
    embed = torch.eye(old).repeat(_times("tile", times), 1)
    return Expansion("tile", embed, embed.T / times)


def _grows(name: str, old: int, new: int) -> None:
    if new < old:
        raise RegraftError(f"{name} cannot shrink an axis from {old} to {new}: give a size of at least {old}")


def _times(name: str, times: int) -> int:
    if times < 1:
        raise RegraftError(f"{name} needs at least one copy, got {times}: give times >= 1")
    return times


def spread(value: Tensor, source: Axes, target: Axes, sizes: Sizes) -> Tensor:
    """Broadcast the leading dimension of `value` over the axes of `target` that `source` lacks.

    value: (product of source, ...) -> (product of target, ...). For 'kv dim' -> 'kv group dim' every key/value head is
    repeated for its queries, head by head: `repeat` on the missing axis of size one. RegraftError when axes of `source`
    have nowhere to go or change order.
    """
    if tuple(axis for axis in target if axis in source) != source:
        missing = [axis for axis in source if axis not in target] or list(source)
        raise RegraftError(
            f"cannot inherit '{' '.join(target)}' from '{' '.join(source)}': axes {missing} have nowhere to go"
        )
    rest = value.shape[1:]
    value = value.reshape(*[sizes[axis] if axis in source else 1 for axis in target], *rest)
    for index, axis in enumerate(target):
        if axis not in source:
            value = value.repeat_interleave(sizes[axis], index)
    return value.reshape(product(target, sizes), *rest)
