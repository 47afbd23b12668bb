"""Transplant: a larger model begun at random, with the source's weights in its old coordinates and
first layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.anatomy import Key, PlacedPart
from ...core.axes import Axes, Signature, product
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.fused import fused_maps, join_fused, split_fused
from ...core.step import step_entry
from ...errors import RegraftError
from ..sizes import TargetSizes, solve_sizes
from ..tensor import SeededRandom
from ..widening import tensor_axes

SPREAD = 0.02  # of fresh matrices where the config does not say it


@dataclass(frozen=True)
class Transplant(TargetSizes):
    """Direct copy: every tensor starts as from scratch (uniform with the config's
    `initializer_range`, gains one, biases zero), then the source's values go into its first
    coordinates along every axis, and its layers into the first layers. The baseline of the growth
    papers (as in LiGO, arXiv 2303.00980) that shows what weights alone give.

    Preserves: nothing; the new random coordinates are read and written from the start.
    Refuses: smaller sizes, sizes the class cannot hold, and moments of an optimiser.
    """

    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The larger checkpoint."""
        if source.holds != "weights":
            raise RegraftError(
                f"a direct copy grows weights, not {source.holds}: train with fresh moments"
            )
        layers = self.layers or source.layers
        if layers < source.layers:
            raise RegraftError(
                f"--layers {layers} is less than the source's {source.layers}: growth never shrinks"
            )

        # Layers beyond the source's take the settings of its last one (kinds of attention, say).
        sizes, _ = solve_sizes(source, self)
        sizes = {**sizes, "depth": layers}
        config = source.anatomy.resize_config(
            source.config, sizes, [min(i, source.layers - 1) for i in range(layers)]
        )
        placed = source.anatomy.place(config)
        larger = replace(
            source,
            config=config,
            sizes=sizes,
            names={key: spot.name for key, spot in placed.items()},
        )
        spread = float(
            source.anatomy.host(config).fill_defaults(config).get("initializer_range") or SPREAD
        )
        tensors = {
            key: transplant_tensor(source, larger, key, spot, spread, self.seed)
            for key, spot in placed.items()
        }
        return replace(larger, tensors=tensors, history=(*source.history, step_entry(self)))


def transplant_tensor(
    source: Checkpoint, larger: Checkpoint, key: Key, spot: PlacedPart, spread: float, seed: int
) -> LazyTensor:
    """One tensor of the larger model: fresh, and the source's tensor of the same key, if any, in
    its first corner.
    """
    role, layer = key
    old = source.tensors.get(key)
    dtype = (old or source.tensors[role, 0]).dtype

    # Fused tensors are filled map by map: the old block of each goes into its own corner.
    def compute() -> Tensor:
        before = split_fused(old.read(), spot.part, source.sizes) if old else []
        values = []
        for index, (name, signature, output) in enumerate(fused_maps(spot.part, role)):
            value = init_tensor(
                signature,
                map_shape(signature, output, larger),
                spread,
                SeededRandom(seed, f"{name}.{layer}"),
                dtype,
            )
            if before:
                block = before[index].reshape(map_shape(signature, output, source))
                corner = tuple(
                    slice(0, min(a, b)) for a, b in zip(block.shape, value.shape, strict=True)
                )
                value[corner] = block[corner]
            values.append(value)
        return join_fused(values, spot.part)

    if old is not None and old.shape == spot.shape:
        return old
    story = (
        Provenance("grown", old.story.sources, "random around the old block")
        if old
        else Provenance("fresh", (), "random")
    )
    return LazyTensor(spot.shape, dtype, story, compute)


def map_shape(signature: Signature, output: Axes, checkpoint: Checkpoint) -> list[int]:
    """Sizes of one map's axes, output first."""
    return [product((axis,), checkpoint.sizes) for axis in tensor_axes(signature, output)]


def init_tensor(
    signature: Signature, shape: list[int], spread: float, draw: SeededRandom, dtype: torch.dtype
) -> Tensor:
    """What training from scratch begins with: random maps, gains and scales one, biases zero."""
    if signature.kind in ("map", "plain"):
        return draw.uniform(shape, spread, dtype)
    one = signature.kind in ("gain", "scale") and not signature.unit
    return torch.full(shape, 1.0 if one else 0.0, dtype=dtype)
