"""Deepen: more layers, idle at first or repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..growth import depth
from ..recipe import entry


@dataclass(frozen=True)
class Deepen:
    """Grow the stack to `layers` (composable expansions, arXiv 2308.06103; LLaMA-Pro, arXiv 2401.02415; StackBERT,
    Gong et al. 2019; G_stack, arXiv 2405.15319; MIDAS, arXiv 2409.19044; SOLAR, arXiv 2312.15166; MSLT, Yang et al.
    2020).

    `how`: `identity` inserts evenly spread layers that add nothing (zero outputs, or zero gains of the norms behind
    them), the rest of them random; `llama_pro` the same with copies of the layer below; `stack` repeats from the
    bottom, `gstack` the whole model, `interpolate` each layer in place, `midas` the middle block, `upscale` joins two
    overlapping copies, `mslt` repeats the top. Per-layer settings follow their layers.

    Preserves: with `identity` and `llama_pro` the logits, bit for bit (post-norm families: up to the norms' epsilon);
    nothing exactly with the others.
    Refuses: fewer layers, and numbers that an operator cannot reach.
    """

    layers: int
    how: str = "identity"
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The deeper checkpoint."""
        order = depth.layers(self.how, source.layers, self.layers)
        sizes = {**source.sizes, "depth": self.layers}
        config = source.anatomy.resized(source.config, sizes, [layer.source for layer in order])
        tensors = depth.deepened(source, config, order, self.how, self.seed)
        names = {key: spot.name for key, spot in source.anatomy.place(config).items()}
        return replace(
            source, config=config, sizes=sizes, tensors=tensors, names=names, history=(*source.history, entry(self))
        )
