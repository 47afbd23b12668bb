"""Transplant: a larger model begun at random, with the source's weights in its old coordinates and first layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.anatomy import Key, Placed
from ...core.axes import Axes, Signature, product
from ...core.checkpoint import Checkpoint, Lazy, Story
from ...core.step import entry
from ...errors import RegraftError
from ..sizes import Sizes, solve
from ..tensor import Draw
from ..widened import apart, pieces, together
from ..widening import view

SPREAD = 0.02  # of fresh matrices where the config does not say it


@dataclass(frozen=True)
class Transplant(Sizes):
    """Direct copy: every tensor starts as from scratch (uniform with the config's `initializer_range`, gains one,
    biases zero), then the source's values go into its first coordinates along every axis, and its layers into the first
    layers. The baseline of the growth papers (as in LiGO, arXiv 2303.00980) that shows what weights alone give.

    Preserves: nothing; the new random coordinates are read and written from the start.
    Refuses: smaller sizes, sizes the class cannot hold, and moments of an optimiser.
    """

    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The larger checkpoint."""
        if source.holds != "weights":
            raise RegraftError(f"a direct copy grows weights, not {source.holds}: train with fresh moments")
        layers = self.layers or source.layers
        if layers < source.layers:
            raise RegraftError(f"--layers {layers} is less than the source's {source.layers}: growth never shrinks")
        sizes, _ = solve(source, self)
        sizes = {**sizes, "depth": layers}
        config = source.anatomy.resized(source.config, sizes, [min(i, source.layers - 1) for i in range(layers)])
        placed = source.anatomy.place(config)
        larger = replace(source, config=config, sizes=sizes, names={key: spot.name for key, spot in placed.items()})
        spread = float(source.anatomy.host(config).filled(config).get("initializer_range") or SPREAD)
        tensors = {key: transplanted(source, larger, key, spot, spread, self.seed) for key, spot in placed.items()}
        return replace(larger, tensors=tensors, history=(*source.history, entry(self)))


def transplanted(source: Checkpoint, larger: Checkpoint, key: Key, spot: Placed, spread: float, seed: int) -> Lazy:
    """One tensor of the larger model: fresh, and the source's tensor of the same key, if any, in its first corner."""
    role, layer = key
    old = source.tensors.get(key)
    dtype = (old or source.tensors[role, 0]).dtype

    def read() -> Tensor:
        before = apart(old.read(), spot.part, source.sizes) if old else []
        values = []
        for index, (name, signature, output) in enumerate(pieces(spot.part, role)):
            value = fresh(signature, shape_of(signature, output, larger), spread, Draw(seed, f"{name}.{layer}"), dtype)
            if before:
                block = before[index].reshape(shape_of(signature, output, source))
                corner = tuple(slice(0, min(a, b)) for a, b in zip(block.shape, value.shape, strict=True))
                value[corner] = block[corner]
            values.append(value)
        return together(values, spot.part)

    if old is not None and old.shape == spot.shape:
        return old
    story = Story("grown", old.story.sources, "random around the old block") if old else Story("fresh", (), "random")
    return Lazy(spot.shape, dtype, story, read)


def shape_of(signature: Signature, output: Axes, checkpoint: Checkpoint) -> list[int]:
    """Sizes of one map's axes, output first."""
    return [product((axis,), checkpoint.sizes) for axis in view(signature, output)]


def fresh(signature: Signature, shape: list[int], spread: float, draw: Draw, dtype: torch.dtype) -> Tensor:
    """What training from scratch begins with: random maps, gains and scales one, biases zero."""
    if signature.kind in ("map", "plain"):
        return draw.uniform(shape, spread, dtype)
    one = signature.kind in ("gain", "scale") and not signature.unit
    return torch.full(shape, 1.0 if one else 0.0, dtype=dtype)
