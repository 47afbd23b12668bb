"""Deeper models: the order of source layers, and layers that start by doing nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Key, Part, PlacedPart
from ..core.axes import product
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.fused import fused_maps, join_fused, split_fused
from ..errors import RegraftError
from .operators import DEPTH, operators_preserving
from .tensor import SeededRandom, compute_dtype, estimate_std
from .widening import kind_of

ORDERS = tuple(DEPTH)
EXACT = operators_preserving(DEPTH, "exactly", "up to rounding")


@dataclass(frozen=True)
class LayerOrigin:
    """One layer of the target: which source layer it comes from, and whether it is `new` and starts
    idle.
    """

    source: int
    new: bool = False


def build_layer_order(how: str, old: int, new: int) -> list[LayerOrigin]:
    """The layers of the target, bottom first. RegraftError for a number that the operator cannot
    reach.
    """
    if how not in ORDERS:
        raise RegraftError(f"unknown --depth-init '{how}': use one of {', '.join(ORDERS)}")
    more = new - old
    if more < 0:
        raise RegraftError(
            f"--layers {new} is less than the source's {old}: growth never shrinks, give {old} or"
            " more"
        )

    # Layers that change nothing, spread evenly: behind which source layer each new one stands.
    if how in EXACT:
        ends = [
            (k + 1) * old // more - 1 if more <= old else (k * old) // more for k in range(more)
        ]
        return [
            item
            for i in range(old)
            for item in [LayerOrigin(i), *[LayerOrigin(i, True)] * ends.count(i)]
        ]

    # Repetition of the whole model, bottom first (StackBERT; G_stack repeats it whole times).
    if how in ("stack", "gstack"):
        if how == "gstack" and new % old:
            raise RegraftError(
                f"gstack repeats the whole model: {new} is no multiple of {old} layers, use"
                f" {format_near_multiples(old, new)}"
            )
        return [LayerOrigin(i % old) for i in range(new)]

    # Every layer as often as the next, copies beside their original.
    if how == "interpolate":
        return [LayerOrigin(i * old // new) for i in range(new)]

    # The model without its last layers, then the model without its first ones (SOLAR).
    if how == "upscale":
        if new > 2 * old:
            raise RegraftError(
                f"upscale joins two overlapping copies: at most {2 * old} layers, not {new}; use"
                " stack"
            )
        return [LayerOrigin(i) for i in [*range(-(-new // 2)), *range(old - new // 2, old)]]
    if more > old:
        raise RegraftError(
            f"{how} repeats layers once: at most {2 * old} layers, not {new}; grow in two stages"
        )

    # Only the middle is repeated (MIDAS); else the top is (MSLT).
    if how == "midas":
        start = (old - more) // 2
        return [LayerOrigin(i) for i in [*range(start + more), *range(start, old)]]
    return [LayerOrigin(i) for i in [*range(old), *range(old - more, old)]]


def format_near_multiples(old: int, new: int) -> str:
    """The multiples of `old` around `new`."""
    return " or ".join(map(str, sorted({max(1, new // old) * old, -(-new // old) * old})))


def deepen_tensors(
    source: Checkpoint, config: dict[str, Any], order: list[LayerOrigin], how: str, seed: int
) -> dict[Key, LazyTensor]:
    """Every tensor of the deeper model by key."""
    spots = source.anatomy.place(source.config)
    quiet = IdentityLayer(source, spots)
    table: dict[Key, LazyTensor] = {}
    for key in source.anatomy.place(config):
        role, layer = key
        if layer is None:
            table[key] = source.tensors[key]
            continue
        place, home = order[layer], (role, order[layer].source)
        lazy = source.tensors[home]

        # Some classes scale scores by the layer's number. Keys make up for it; Adam's first moment
        # is a gradient and scales by the inverse, its second by the square of that.
        change = softmax_scale_ratio(source, config, place.source, layer)
        if source.holds != "weights":
            change **= -1 if source.holds == "exp_avg" else -2
        if change != 1.0 and any(
            kind_of(base) == "k" for base, _, _ in fused_maps(spots[home].part, role)
        ):
            lazy = rescale_keys(source, spots[home].part, role, lazy, change)

        # Post-norm models: the layer before a new one hands on its last norm, which the new layer
        # then applies (docs/concepts/expansions.md, L9).
        followed = layer + 1 < len(order) and order[layer + 1].new
        if quiet.hands_on and role.startswith(quiet.last) and followed:
            lazy = quiet.neutral_norm(home, lazy)
        elif place.new:
            lazy = quiet.idle_tensor(home, lazy, how, SeededRandom(seed, f"{role}.{layer}"))
        table[key] = lazy
    return table


def softmax_scale_ratio(
    source: Checkpoint, config: dict[str, Any], before: int, after: int
) -> float:
    """What keys of a layer that moves are multiplied by when the softmax scale depends on the
    layer.
    """
    anatomy, family, dim = source.anatomy, source.anatomy.host(source.config), source.sizes["dim"]
    return family.scale(anatomy.fill_defaults(source.config), dim, before) / family.scale(
        anatomy.fill_defaults(config), dim, after
    )


def rescale_keys(
    source: Checkpoint, part: Part, role: str, lazy: LazyTensor, change: float
) -> LazyTensor:
    """A tensor with its keys multiplied."""
    roles = [kind_of(base) for base, _, _ in fused_maps(part, role)]

    def compute() -> Tensor:
        values = split_fused(lazy.read(), part, source.sizes)
        grown = [
            (v.to(compute_dtype(v.dtype)) * change).to(v.dtype) if kind == "k" else v
            for kind, v in zip(roles, values, strict=True)
        ]
        return repack_maps(grown, part, source)

    return replace(
        lazy,
        read=compute,
        story=Provenance("grown", lazy.story.sources, f"keys times {change:.6g}"),
    )


def repack_maps(values: list[Tensor], part: Part, source: Checkpoint) -> Tensor:
    """Maps of source sizes (outputs, inputs) packed and stored as the part wants."""
    views = []
    for value, (_, signature, output) in zip(values, fused_maps(part, "x.weight"), strict=True):
        axes = (*output, *signature.inputs)
        views.append(value.reshape([product((axis,), source.sizes) for axis in axes]))
    return join_fused(views, part)


class IdentityLayer:
    """How a layer of a family does nothing: by zero outputs, by zero gains of the norms behind
    them, or, where the norm comes after the sum, by taking over the affine map of the norm before
    it.
    """

    def __init__(self, source: Checkpoint, spots: Mapping[Key, PlacedPart]):
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
            if not part.norm
            and part.axes.kind in ("map", "bias")
            and any("hidden" in o for o in part.axes.outputs)
        }

    def idle_tensor(self, key: Key, lazy: LazyTensor, how: str, draw: SeededRandom) -> LazyTensor:
        """A tensor of a layer that starts by doing nothing; `how` says whether the rest is random
        or copied.
        """
        role = key[0]
        part = self.spots[key].part

        # Moments of a layer that did not exist are zero; second moments keep the copied layer's
        # size, so that the first steps are not too long.
        if self.source.holds != "weights":
            moved = role in self.norms and role.startswith(self.last)
            return (
                lazy if moved or self.source.holds == "exp_avg_sq" else constant_tensor(lazy, 0.0)
            )

        # An output norm of gain zero silences the branch and lets its maps learn at once (L10).
        if role in self.gains:
            return constant_tensor(lazy, -1.0 if part.axes.unit else 0.0)
        if role in self.norms and not role.startswith(self.last):
            return self.neutral_norm(key, lazy)
        if role in self.norms:
            return replace(
                lazy,
                story=Provenance("copied", lazy.story.sources, "taken over from the norm before"),
            )

        # Without such a norm the output projection is zero; the maps before it keep live entries.
        if role in self.outputs and not self.gains:
            return constant_tensor(lazy, 0.0)
        if how == "llama_pro":
            return randomize_zero_rows(lazy, draw)
        return random_tensor(lazy, part, draw)

    def neutral_norm(self, key: Key, lazy: LazyTensor) -> LazyTensor:
        """A norm without an affine map of its own: gain one, bias zero; its moments start anew."""
        axes = self.spots[key].part.axes
        one = axes.kind == "gain" and not axes.unit and self.source.holds == "weights"
        return constant_tensor(lazy, 1.0 if one else 0.0)


def constant_tensor(lazy: LazyTensor, value: float) -> LazyTensor:
    """A tensor of one number."""
    story = Provenance("zero" if value in (0.0, -1.0) else "fresh", (), f"all {value:g}")
    return replace(lazy, story=story, read=lambda: torch.full(lazy.shape, value, dtype=lazy.dtype))


def random_tensor(lazy: LazyTensor, part: Part, draw: SeededRandom) -> LazyTensor:
    """Fresh numbers: as spread out as the layer below's for maps, neutral for gains and biases."""
    kind = part.axes.kind
    if kind in ("gain", "bias"):
        return constant_tensor(lazy, 1.0 if kind == "gain" and not part.axes.unit else 0.0)
    if kind == "scale":
        return lazy
    read: Callable[[], Tensor] = lambda: draw_like(lazy, draw)  # noqa: E731
    return replace(
        lazy, story=Provenance("fresh", (), "uniform, as spread out as the layer below"), read=read
    )


def draw_like(lazy: LazyTensor, draw: SeededRandom) -> Tensor:
    """Random numbers of a tensor's shape, dtype and spread."""
    return draw.uniform(lazy.shape, estimate_std(lazy.read()), lazy.dtype)


def randomize_zero_rows(lazy: LazyTensor, draw: SeededRandom) -> LazyTensor:
    """A copy whose all-zero rows hold random numbers: behind a zero gain they would never learn."""
    if len(lazy.shape) != 2:
        return lazy

    def compute() -> Tensor:
        value = lazy.read()
        silent = (value == 0).all(1)
        if bool(silent.any()):
            value = value.clone()
            value[silent] = draw.uniform(
                (int(silent.sum()), value.shape[1]), estimate_std(value), value.dtype
            )
        return value

    return replace(lazy, read=compute)
