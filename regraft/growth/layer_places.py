"""Deeper models whose class says itself which kind of layer stands where, by a period or a number
of first layers: an order of layers that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.anatomy import Anatomy, Config
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from .depth import EXACT, LayerOrigin

Kind = frozenset[tuple[str, tuple[int, ...]]]  # roles and shapes of a layer's tensors


@dataclass(frozen=True)
class DeepStack:
    """A deeper stack: its config, and where its layers come from, bottom first."""

    config: dict[str, Any]
    order: list[LayerOrigin]
    # How many layers of the source are done after each layer; None: those up to its origin.
    layers_done: list[int] | None = None


def fit_stack(
    source: Checkpoint, order: list[LayerOrigin], how: str, depths: Mapping[str, int]
) -> DeepStack:
    """The stack of an order of layers; where its class has other kinds of layers in these places,
    one with the source's layers in places that have their kinds, and new layers in the others.

    RegraftError when there is none.

    Args:
        source: the checkpoint to deepen.
        order: where each layer of the target comes from.
        how: the depth operator; operators that keep nothing exactly take any layer.
        depths: layers of every stack of the target, by the axis that counts them. Layers of an
            encoder in front of a decoder are of one kind.
    """
    config = _build_config(source, order, depths)
    if len(depths) > 1:
        return DeepStack(config, order)
    before, after = (
        list_kinds(source.anatomy, one, layers)
        for one, layers in ((source.config, source.layers), (config, len(order)))
    )
    if how not in EXACT or _fits(order, before, after):
        return DeepStack(config, order)

    fitted = _place_layers(before, after)
    if fitted is not None:
        config = _build_config(source, fitted, depths)
        if _fits(fitted, before, list_kinds(source.anatomy, config, len(fitted))):
            kept = [not origin.new for origin in fitted]
            counts = [sum(kept[: layer + 1]) for layer in range(len(fitted))]
            return DeepStack(config, fitted, counts)
    raise RegraftError(
        f"the kinds of {len(order)} layers, as {source.anatomy.family} orders them, have no place "
        f"for the source's {source.layers} layers in order: give another --layers"
    )


def _build_config(
    source: Checkpoint, order: list[LayerOrigin], depths: Mapping[str, int]
) -> dict[str, Any]:
    sizes = {**source.sizes, **depths}
    return source.anatomy.resize_config(source.config, sizes, [layer.source for layer in order])


def list_kinds(anatomy: Anatomy, config: Config, layers: int) -> list[Kind]:
    """What tensors each layer has."""
    found: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(layers)]
    for (role, layer), placed in anatomy.place(config).items():
        if layer is not None:
            found[layer].add((role, placed.shape))
    return [frozenset(one) for one in found]


def _fits(order: list[LayerOrigin], before: list[Kind], after: list[Kind]) -> bool:
    """Whether every layer of the source that is kept has the place of a layer like it, and new
    layers have tensors that some layer of the source has.
    """
    known = frozenset().union(*before)
    return all(
        kind <= known if origin.new else kind == before[origin.source]
        for origin, kind in zip(order, after, strict=True)
    )


def _place_layers(before: list[Kind], after: list[Kind]) -> list[LayerOrigin] | None:
    """The layers of the source in the first places that fit, in order; None if some have none."""
    order: list[LayerOrigin] = []
    following = 0
    for kind in after:
        if following < len(before) and before[following] == kind:
            order.append(LayerOrigin(following))
            following += 1
        elif kind in before and order:
            # Shaped like the nearest layer below of its kind, else the first above.
            below = [layer for layer in range(following) if before[layer] == kind]
            order.append(LayerOrigin(below[-1] if below else before.index(kind), new=True))
        else:
            return None
    return order if following == len(before) else None
