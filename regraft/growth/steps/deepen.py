"""Deepen: more layers, idle at first or repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from .. import depth
from ..layer_places import fit_stack
from ..operators import DEPTH, describe_operators, list_papers
from ..stacks import DECODER, resolve_depths


@describe_operators(DEPTH)
@dataclass(frozen=True)
class Deepen:
    """Grow the stack to `layers`; of an encoder and a decoder both, where they are equally deep, or
    each to its own number. Per-layer settings follow their layers. `how`:

    {operators}

    From {papers}.

    Preserves: with {exact} the logits, bit for bit (post-norm families: up to the norms' epsilon);
    nothing exactly with {inexact}.
    Refuses: fewer layers, and numbers that an operator cannot reach.
    """

    layers: int | None = None
    how: str = "identity"
    seed: int = 0
    encoder_layers: int | None = None
    decoder_layers: int | None = None

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The deeper checkpoint."""
        depths = resolve_depths(source, self.layers, self.encoder_layers, self.decoder_layers)
        first = source.anatomy.first_layers(source.config)
        orders = {
            axis: depth.build_layer_order(self.how, source.sizes[axis], layers, first)
            for axis, layers in depths.items()
        }
        stack = fit_stack(source, orders[DECODER], self.how, depths)
        config, orders[DECODER] = stack.config, stack.order
        tensors = depth.deepen_tensors(source, config, orders, self.how, self.seed)

        # The lineage names the papers behind the operator, and stacks that were named.
        step = step_entry(self) | {"papers": list_papers(DEPTH, [self.how])}
        if stack.layers_done is not None:
            step["layers_done"] = stack.layers_done
        for name in ("encoder_layers", "decoder_layers"):
            if step["arguments"][name] is None:
                del step["arguments"][name]
        names = {key: placed.name for key, placed in source.anatomy.place(config).items()}
        return replace(
            source,
            config=config,
            sizes={**source.sizes, **depths},
            tensors=tensors,
            names=names,
            history=(*source.history, step),
        )
