"""Deepen: more layers, idle at first or repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from .. import depth
from ..layer_places import fit_stack
from ..operators import DEPTH, describe_operators, list_papers


@describe_operators(DEPTH)
@dataclass(frozen=True)
class Deepen:
    """Grow the stack to `layers`. Per-layer settings follow their layers. `how`:

    {operators}

    From {papers}.

    Preserves: with {exact} the logits, bit for bit (post-norm families: up to the norms' epsilon);
    nothing exactly with {inexact}.
    Refuses: fewer layers, and numbers that an operator cannot reach.
    """

    layers: int
    how: str = "identity"
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The deeper checkpoint."""
        first = source.anatomy.first_layers(source.config)
        order = depth.build_layer_order(self.how, source.layers, self.layers, first)
        sizes = {**source.sizes, "depth": self.layers}
        stack = fit_stack(source, order, self.how)
        config = stack.config
        tensors = depth.deepen_tensors(source, config, stack.order, self.how, self.seed)

        # The lineage names the papers behind the operator.
        step = step_entry(self) | {"papers": list_papers(DEPTH, [self.how])}
        if stack.layers_done is not None:
            step["layers_done"] = stack.layers_done
        names = {key: placed.name for key, placed in source.anatomy.place(config).items()}
        return replace(
            source,
            config=config,
            sizes=sizes,
            tensors=tensors,
            names=names,
            history=(*source.history, step),
        )
