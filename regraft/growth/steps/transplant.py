"""Transplant: a larger random model with the source's weights in its old coordinates and first
layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.anatomy import Key, PlacedPart
from ...core.axes import Axes, Signature, product
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.fused import fused_maps, join_fused, split_fused
from ...core.shapes import Float
from ...core.step import step_entry
from ...errors import RegraftError
from ..sizes import solve_sizes
from ..target_sizes import TargetSizes
from ..tensor import SeededRandom
from ..widening import tensor_axes

DEFAULT_STD = 0.02  # of fresh matrices where the config has no initializer_range


@dataclass(frozen=True)
class Transplant(TargetSizes):
    """Direct copy: every tensor starts as from scratch (uniform with the config's
    `initializer_range`, gains one, biases zero), then the source's values go into its first
    coordinates along every axis, and its layers into the first layers. The baseline of the growth
    papers (as in LiGO, arXiv 2303.00980) that shows what weights alone give.

    Preserves: nothing; the new random coordinates are read and written from the start.
    Refuses: smaller sizes, sizes the class cannot hold, and moments of an optimiser.
    """

    # Of the random numbers.
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
        order = [min(i, source.layers - 1) for i in range(layers)]
        config = source.anatomy.resize_config(source.config, sizes, order)

        targets = source.anatomy.place(config)
        names = {key: target.name for key, target in targets.items()}
        larger = replace(source, config=config, sizes=sizes, names=names)
        full = source.anatomy.host(config).fill_defaults(config)
        std = float(full.get("initializer_range") or DEFAULT_STD)
        tensors = {
            key: transplant_tensor(source, larger, key, target, std, self.seed)
            for key, target in targets.items()
        }
        return replace(larger, tensors=tensors, history=(*source.history, step_entry(self)))


def transplant_tensor(
    source: Checkpoint, larger: Checkpoint, key: Key, target: PlacedPart, std: float, seed: int
) -> LazyTensor:
    """One tensor of the larger model: fresh, with the source's tensor of the same key, if there is
    one, in its first corner.

    Args:
        source: the checkpoint to copy from.
        larger: the target's config and sizes.
        key: role and layer of the tensor.
        target: the tensor.
        std: standard deviation of random numbers.
        seed: of random numbers.
    """
    role, layer = key
    part, old = target.part, source.tensors.get(key)
    dtype = (old or source.tensors[role, 0]).dtype
    if old is not None and old.shape == target.shape:
        return old

    def compute() -> Float[Tensor, "*stored"]:
        # Fused tensors are filled map by map: the old block of each goes into its own corner.
        blocks = split_fused(old.read(), part, source.sizes) if old else None
        values = []
        for index, (name, signature, output) in enumerate(fused_maps(part, role)):
            shape = map_shape(signature, output, larger)
            random = SeededRandom(seed, f"{name}.{layer}")
            value = init_tensor(signature, shape, std, random, dtype)
            if blocks:
                block = blocks[index].reshape(map_shape(signature, output, source))
                both = zip(block.shape, value.shape, strict=True)
                corner = tuple(slice(0, min(before, after)) for before, after in both)
                value[corner] = block[corner]
            values.append(value)
        return join_fused(values, part)

    provenance = Provenance("fresh", (), "random")
    if old:
        provenance = Provenance("grown", old.provenance.sources, "random around the old block")
    return LazyTensor(target.shape, dtype, provenance, compute)


def map_shape(signature: Signature, output: Axes, checkpoint: Checkpoint) -> list[int]:
    """Sizes of one map's axes, output first."""
    return [product((axis,), checkpoint.sizes) for axis in tensor_axes(signature, output)]


def init_tensor(
    signature: Signature, shape: list[int], std: float, random: SeededRandom, dtype: torch.dtype
) -> Float[Tensor, "*axes"]:
    """What training from scratch begins with: random maps, gains and scales one, biases zero."""
    if signature.kind in ("map", "plain"):
        return random.uniform(shape, std, dtype)
    one = signature.kind in ("gain", "scale") and not signature.unit
    return torch.full(shape, 1.0 if one else 0.0, dtype=dtype)
