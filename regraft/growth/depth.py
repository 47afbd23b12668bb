"""Deeper models: the order of source layers, and layers that start by doing nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Key, Part, Placed
from ..core.axes import product
from ..core.checkpoint import Checkpoint, Lazy, Story
from ..errors import RegraftError
from .operators import DEPTH, preserving
from .tensor import Draw, spread_of, wide
from .widened import apart, pieces, together
from .widening import kind_of

ORDERS = tuple(DEPTH)
EXACT = preserving(DEPTH, "exactly", "up to rounding")


@dataclass(frozen=True)
class Layer:
    """One layer of the target: which source layer it comes from, and whether it is `new` and starts idle."""

    source: int
    new: bool = False


def layers(how: str, old: int, new: int) -> list[Layer]:
    """The layers of the target, bottom first. RegraftError for a number that the operator cannot reach."""
    if how not in ORDERS:
        raise RegraftError(f"unknown --depth-how '{how}': use one of {', '.join(ORDERS)}")
    more = new - old
    if more < 0:
        raise RegraftError(f"--layers {new} is less than the source's {old}: growth never shrinks, give {old} or more")
    if how in EXACT:
        ends = [(k + 1) * old // more - 1 if more <= old else (k * old) // more for k in range(more)]
        return [item for i in range(old) for item in [Layer(i), *[Layer(i, True)] * ends.count(i)]]
    if how in ("stack", "gstack"):
        if how == "gstack" and new % old:
            raise RegraftError(
                f"gstack repeats the whole model: {new} is no multiple of {old} layers, use {near(old, new)}"
            )
        return [Layer(i % old) for i in range(new)]
    if how == "interpolate":
        return [Layer(i * old // new) for i in range(new)]
    if how == "upscale":
        if new > 2 * old:
            raise RegraftError(f"upscale joins two overlapping copies: at most {2 * old} layers, not {new}; use stack")
        return [Layer(i) for i in [*range(-(-new // 2)), *range(old - new // 2, old)]]
    if more > old:
        raise RegraftError(f"{how} repeats layers once: at most {2 * old} layers, not {new}; grow in two stages")
    if how == "midas":
        start = (old - more) // 2
        return [Layer(i) for i in [*range(start + more), *range(start, old)]]
    return [Layer(i) for i in [*range(old), *range(old - more, old)]]


def near(old: int, new: int) -> str:
    """The multiples of `old` around `new`."""
    return " or ".join(map(str, sorted({max(1, new // old) * old, -(-new // old) * old})))


def deepened(source: Checkpoint, config: dict[str, Any], order: list[Layer], how: str, seed: int) -> dict[Key, Lazy]:
    """Every tensor of the deeper model by key."""
    spots = source.anatomy.place(source.config)
    quiet = Quiet(source, spots)
    table: dict[Key, Lazy] = {}
    for key in source.anatomy.place(config):
        role, layer = key
        if layer is None:
            table[key] = source.tensors[key]
            continue
        place, home = order[layer], (role, order[layer].source)
        lazy = source.tensors[home]
        change = softmax_change(source, config, place.source, layer)
        if source.holds != "weights":
            change **= -1 if source.holds == "exp_avg" else -2
        if change != 1.0 and any(kind_of(base) == "k" for base, _, _ in pieces(spots[home].part, role)):
            lazy = rescaled(source, spots[home].part, role, lazy, change)
        followed = layer + 1 < len(order) and order[layer + 1].new
        if quiet.hands_on and role.startswith(quiet.last) and followed:
            lazy = quiet.plain(home, lazy)
        elif place.new:
            lazy = quiet.idle(home, lazy, how, Draw(seed, f"{role}.{layer}"))
        table[key] = lazy
    return table


def softmax_change(source: Checkpoint, config: dict[str, Any], before: int, after: int) -> float:
    """What keys of a layer that moves are multiplied by when the softmax scale depends on the layer."""
    anatomy, family, dim = source.anatomy, source.anatomy.host(source.config), source.sizes["dim"]
    return family.scale(anatomy.filled(source.config), dim, before) / family.scale(anatomy.filled(config), dim, after)


def rescaled(source: Checkpoint, part: Part, role: str, lazy: Lazy, change: float) -> Lazy:
    """A tensor with its keys multiplied."""
    roles = [kind_of(base) for base, _, _ in pieces(part, role)]

    def read() -> Tensor:
        values = apart(lazy.read(), part, source.sizes)
        grown = [
            (v.to(wide(v.dtype)) * change).to(v.dtype) if kind == "k" else v
            for kind, v in zip(roles, values, strict=True)
        ]
        return repacked(grown, part, source)

    return replace(lazy, read=read, story=Story("grown", lazy.story.sources, f"keys times {change:.6g}"))


def repacked(values: list[Tensor], part: Part, source: Checkpoint) -> Tensor:
    """Maps of source sizes (outputs, inputs) packed and stored as the part wants."""
    views = []
    for value, (_, signature, output) in zip(values, pieces(part, "x.weight"), strict=True):
        axes = (*output, *signature.inputs)
        views.append(value.reshape([product((axis,), source.sizes) for axis in axes]))
    return together(views, part)


class Quiet:
    """How a layer of a family does nothing: by zero outputs, by zero gains of the norms behind them, or, where the
    norm comes after the sum, by taking over the affine map of the norm before it.
    """

    def __init__(self, source: Checkpoint, spots: Mapping[Key, Placed]):
        self.source, self.spots = source, spots
        layered = {role: spot.part for (role, layer), spot in spots.items() if layer is not None}
        after = {role for role, part in layered.items() if part.norm and part.writes == "stream"}
        biased = {role for role in after if layered[role].axes.kind == "bias"}
        self.hands_on = bool(biased)
        self.gains = after if not biased else set()
        self.norms = after if biased else set()
        order = [role.rpartition(".")[0] for role in layered if role in self.norms]
        self.last = f"{order[-1]}." if order else ""
        self.outputs = {
            role
            for role, part in layered.items()
            if not part.norm and part.axes.kind in ("map", "bias") and any("hidden" in o for o in part.axes.outputs)
        }

    def idle(self, key: Key, lazy: Lazy, how: str, draw: Draw) -> Lazy:
        """A tensor of a layer that starts by doing nothing; `how` says whether the rest is random or copied."""
        role = key[0]
        part = self.spots[key].part
        if self.source.holds != "weights":
            moved = role in self.norms and role.startswith(self.last)
            return lazy if moved or self.source.holds == "exp_avg_sq" else filled(lazy, 0.0)
        if role in self.gains:
            return filled(lazy, -1.0 if part.axes.unit else 0.0)
        if role in self.norms and not role.startswith(self.last):
            return self.plain(key, lazy)
        if role in self.norms:
            return replace(lazy, story=Story("copied", lazy.story.sources, "taken over from the norm before"))
        if role in self.outputs and not self.gains:
            return filled(lazy, 0.0)
        if how == "llama_pro":
            return awake(lazy, draw)
        return random(lazy, part, draw)

    def plain(self, key: Key, lazy: Lazy) -> Lazy:
        """A norm without an affine map of its own: gain one, bias zero; its moments start anew."""
        axes = self.spots[key].part.axes
        one = axes.kind == "gain" and not axes.unit and self.source.holds == "weights"
        return filled(lazy, 1.0 if one else 0.0)


def filled(lazy: Lazy, value: float) -> Lazy:
    """A tensor of one number."""
    story = Story("zero" if value in (0.0, -1.0) else "fresh", (), f"all {value:g}")
    return replace(lazy, story=story, read=lambda: torch.full(lazy.shape, value, dtype=lazy.dtype))


def random(lazy: Lazy, part: Part, draw: Draw) -> Lazy:
    """Fresh numbers: as spread out as the layer below's for maps, neutral for gains and biases."""
    kind = part.axes.kind
    if kind in ("gain", "bias"):
        return filled(lazy, 1.0 if kind == "gain" and not part.axes.unit else 0.0)
    if kind == "scale":
        return lazy
    read: Callable[[], Tensor] = lambda: draw_like(lazy, draw)  # noqa: E731
    return replace(lazy, story=Story("fresh", (), "uniform, as spread out as the layer below"), read=read)


def draw_like(lazy: Lazy, draw: Draw) -> Tensor:
    """Random numbers of a tensor's shape, dtype and spread."""
    return draw.uniform(lazy.shape, spread_of(lazy.read()), lazy.dtype)


def awake(lazy: Lazy, draw: Draw) -> Lazy:
    """A copy whose all-zero rows hold random numbers: behind a zero gain they would never learn."""
    if len(lazy.shape) != 2:
        return lazy

    def read() -> Tensor:
        value = lazy.read()
        silent = (value == 0).all(1)
        if bool(silent.any()):
            value = value.clone()
            value[silent] = draw.uniform((int(silent.sum()), value.shape[1]), spread_of(value), value.dtype)
        return value

    return replace(lazy, read=read)
