"""Deeper models: which layer of the source each layer comes from, and the tensors that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..core.anatomy import Key, Part
from ..core.axes import product
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.fused import fused_maps, join_fused, split_fused
from ..core.shapes import Float
from ..errors import RegraftError
from .identity_layer import IdentityLayer
from .operators import DEPTH, operators_preserving
from .tensor import SeededRandom, compute_dtype
from .widening import kind_of

ORDERS = tuple(DEPTH)
EXACT = operators_preserving(DEPTH, "exactly", "up to rounding")


@dataclass(frozen=True)
class LayerOrigin:
    """Where one layer of the target comes from."""

    source: int  # the layer of the source, counted from the bottom
    new: bool = False  # it starts as the identity instead of a copy


def build_layer_order(operator: str, old: int, new: int, first: int = 0) -> list[LayerOrigin]:
    """The layers of the target, bottom first.

    RegraftError for an unknown operator and for a number of layers that it cannot reach.

    Args:
        operator: a name of `--depth-init`.
        old: layers of the source.
        new: layers of the target.
        first: layers that stay the first ones, where new layers are the identity.
    """
    if operator not in ORDERS:
        raise RegraftError(f"unknown --depth-init '{operator}': use one of {', '.join(ORDERS)}")
    if new < old:
        raise RegraftError(
            f"--layers {new} is less than the source's {old}: growth never shrinks, give {old} or"
            " more"
        )
    if operator not in EXACT or not first:
        return LAYER_ORDERS[operator](old, new)
    if first > old:
        raise RegraftError(
            f"the model adds to what its first {first} layers give and has {old}: keep"
            f" --layers {old}"
        )
    # New layers stand behind the first ones; where all are, behind the last.
    kept = min(first, old - 1)
    rest = LAYER_ORDERS[operator](old - kept, new - kept)
    layers = [LayerOrigin(layer) for layer in range(kept)]
    return [*layers, *(LayerOrigin(one.source + kept, one.new) for one in rest)]


def _insert_identity(old: int, new: int) -> list[LayerOrigin]:
    """New layers spread evenly, each behind the source layer that it is shaped like."""
    # The layer behind which each new one stands. Up to twice the layers, the last new layer stands
    # on top of the model; beyond that every layer gets its share.
    more = new - old
    if more <= old:
        behind = [(k + 1) * old // more - 1 for k in range(more)]
    else:
        behind = [k * old // more for k in range(more)]

    order: list[LayerOrigin] = []
    for layer in range(old):
        order += [LayerOrigin(layer), *[LayerOrigin(layer, new=True)] * behind.count(layer)]
    return order


def _stack(old: int, new: int) -> list[LayerOrigin]:
    """The whole model again from the bottom (StackBERT)."""
    return _copies(layer % old for layer in range(new))


def _stack_whole(old: int, new: int) -> list[LayerOrigin]:
    """The whole model a whole number of times (G_stack)."""
    if new % old:
        raise RegraftError(
            f"gstack repeats the whole model: {new} is no multiple of {old} layers, use"
            f" {format_near_multiples(old, new)}"
        )
    return _stack(old, new)


def _interpolate(old: int, new: int) -> list[LayerOrigin]:
    """Every layer as often as the next, copies beside their original."""
    return _copies(layer * old // new for layer in range(new))


def _upscale(old: int, new: int) -> list[LayerOrigin]:
    """The model without its last layers, then the model without its first ones (SOLAR)."""
    if new > 2 * old:
        raise RegraftError(
            f"upscale joins two overlapping copies: at most {2 * old} layers, not {new}; use stack"
        )
    upper = new // 2
    return _copies([*range(new - upper), *range(old - upper, old)])


def _repeat_middle(old: int, new: int) -> list[LayerOrigin]:
    """The block of layers in the middle twice (MIDAS)."""
    more = _check_repeated_once("midas", old, new)
    start = (old - more) // 2
    return _copies([*range(start + more), *range(start, old)])


def _repeat_top(old: int, new: int) -> list[LayerOrigin]:
    """The top layers once more on top (MSLT)."""
    more = _check_repeated_once("mslt", old, new)
    return _copies([*range(old), *range(old - more, old)])


def _check_repeated_once(operator: str, old: int, new: int) -> int:
    """The number of new layers; RegraftError when it is more than there are to repeat."""
    if new - old > old:
        raise RegraftError(
            f"{operator} repeats layers once: at most {2 * old} layers, not {new}; grow in two"
            " stages"
        )
    return new - old


def _copies(layers: Iterable[int]) -> list[LayerOrigin]:
    return [LayerOrigin(layer) for layer in layers]


# The layers of the target, from the numbers of layers before and after.
LAYER_ORDERS: dict[str, Callable[[int, int], list[LayerOrigin]]] = {
    "identity": _insert_identity,
    "llama_pro": _insert_identity,
    "stack": _stack,
    "gstack": _stack_whole,
    "interpolate": _interpolate,
    "midas": _repeat_middle,
    "upscale": _upscale,
    "mslt": _repeat_top,
}


def format_near_multiples(old: int, new: int) -> str:
    """The multiples of `old` around `new`, for messages."""
    return " or ".join(map(str, sorted({max(1, new // old) * old, -(-new // old) * old})))


def deepen_tensors(
    source: Checkpoint,
    config: dict[str, Any],
    orders: Mapping[str, list[LayerOrigin]],
    how: str,
    seed: int,
) -> dict[Key, LazyTensor]:
    """Every tensor of the deeper model by key.

    Args:
        source: the checkpoint to deepen.
        config: the target's config.
        orders: where each layer of the target comes from, by the axis that counts a stack's
            layers.
        how: the depth operator.
        seed: of random entries in new layers.
    """
    placed = source.anatomy.place(source.config)
    identity_layers = {stack: IdentityLayer(source, placed, stack) for stack in orders}
    tensors: dict[Key, LazyTensor] = {}
    for key, target in source.anatomy.place(config).items():
        role, layer = key
        if layer is None:
            lazy = source.tensors[key]
            counted = [axis for axis in orders if axis in target.part.axes.inputs]
            if counted:  # it reads every layer of a stack
                old = [source.sizes[axis] for axis in target.part.axes.inputs]
                lazy = read_layers(lazy, target.shape, orders[counted[0]], old)
            tensors[key] = lazy
            continue
        if target.part.stack not in orders:  # it stands beside what grows
            tensors[key] = source.tensors[key]
            continue
        order, identity_layer = orders[target.part.stack], identity_layers[target.part.stack]
        origin = order[layer]
        own = origin.source
        if (role, own) not in placed:  # the first layer may lack what later ones have
            own = next(n for other, n in placed if other == role and n is not None)
        old_key = (role, own)
        lazy = _move_layer(source, config, placed[old_key].part, *old_key, layer)

        # Post-norm models: the layer before a new one hands on its last norm, which the new layer
        # then applies (docs/concepts/expansions.md, L9).
        before_new = layer + 1 < len(order) and order[layer + 1].new
        if before_new and identity_layer.is_last_norm(role):
            lazy = identity_layer.neutral_norm(old_key, lazy)
        elif origin.new:
            random = partial(SeededRandom, seed, f"{role}.{layer}")
            lazy = identity_layer.build_tensor(old_key, lazy, how, random)
        tensors[key] = lazy
    return tensors


def read_layers(
    lazy: LazyTensor, shape: tuple[int, ...], order: list[LayerOrigin], inputs: list[int]
) -> LazyTensor:
    """A map outside the stack that reads something of every layer: zeros for new layers.

    Args:
        lazy: the map as the source has it, (outputs, inputs), whose first input axis counts layers.
        shape: of the target's.
        order: where each layer of the target comes from.
        inputs: sizes of its input axes in the source.
    """

    def compute() -> Float[Tensor, "outputs inputs"]:
        value = lazy.read().reshape(-1, *inputs)  # (outputs, layers, ...)
        grown = value[:, [origin.source for origin in order]]
        grown[:, [layer for layer, origin in enumerate(order) if origin.new]] = 0
        return grown.reshape(shape)

    provenance = Provenance("grown", lazy.provenance.sources, f"{len(order)} layers")
    return replace(lazy, shape=shape, read=compute, provenance=provenance)


def _move_layer(
    source: Checkpoint, config: dict[str, Any], part: Part, role: str, before: int, after: int
) -> LazyTensor:
    """A tensor of the source's layer `before` that acts the same in layer `after` of the target."""
    # Some classes scale scores by the layer's number. Keys make up for it; Adam's first moment is a
    # gradient and scales by the inverse, its second by the square of that.
    change = softmax_scale_ratio(source, config, before, after)
    if source.holds != "weights":
        change **= -1 if source.holds == "exp_avg" else -2

    lazy = source.tensors[role, before]
    has_keys = any(kind_of(one.role) == "k" for one in fused_maps(part, role))
    return rescale_keys(source, part, role, lazy, change) if has_keys and change != 1.0 else lazy


def softmax_scale_ratio(
    source: Checkpoint, config: dict[str, Any], before: int, after: int
) -> float:
    """What keys of a layer that moves are multiplied by when the softmax scale depends on the
    layer.

    Args:
        source: the model that the layer comes from.
        config: the target's config.
        before: the layer's number in the source.
        after: its number in the target.
    """
    anatomy, dim = source.anatomy, source.sizes["dim"]
    scale = anatomy.host(source.config).scale
    old = scale(anatomy.fill_defaults(source.config), dim, before)
    return old / scale(anatomy.fill_defaults(config), dim, after)


def rescale_keys(
    source: Checkpoint, part: Part, role: str, lazy: LazyTensor, change: float
) -> LazyTensor:
    """A tensor with its keys multiplied by `change`; queries and values packed with them stay."""
    kinds = [kind_of(one.role) for one in fused_maps(part, role)]

    def rescale(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (value.to(compute_dtype(value.dtype)) * change).to(value.dtype)

    def compute() -> Float[Tensor, "*stored"]:
        values = split_fused(lazy.read(), part, source.sizes)
        changed = [
            rescale(value) if kind == "k" else value
            for kind, value in zip(kinds, values, strict=True)
        ]
        return repack_maps(changed, part, source)

    provenance = Provenance("grown", lazy.provenance.sources, f"keys times {change:.6g}")
    return replace(lazy, read=compute, provenance=provenance)


def repack_maps(
    values: list[Float[Tensor, "*axes"]], part: Part, source: Checkpoint
) -> Float[Tensor, "*stored"]:
    """Maps of the source's sizes, (outputs, inputs), packed and stored as the part wants."""
    views = []
    for value, (_, signature, output) in zip(values, fused_maps(part, "x.weight"), strict=True):
        axes = (*output, *signature.inputs)
        views.append(value.reshape([product((axis,), source.sizes) for axis in axes]))
    return join_fused(views, part)
