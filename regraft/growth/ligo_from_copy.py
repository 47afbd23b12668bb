"""LiGO that begins as a direct copy: random weights everywhere, and old weights that also reach new
coordinates by maps that learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint
from ..core.shapes import Float
from .depth import LayerOrigin
from .ligo import Grower, Maps
from .ligo_options import Ligo
from .widening import Widening


class GrowerFromCopy(Grower):
    """What the maps give, plus what a direct copy has beyond the maps as they begin.

    Before any step it is the direct copy. Layers beyond the source's begin without a share of old
    ones: they are the copy's alone.

    Args:
        widening: the target's widths.
        order: what each layer of the target is at first.
        method: LiGO's options.
        seed: of random rows and shares of layers.
        start: the direct copy.
    """

    def __init__(
        self,
        widening: Widening,
        order: Sequence[LayerOrigin],
        method: Ligo,
        seed: int,
        start: Checkpoint,
    ):
        super().__init__(widening, order, method, seed)
        start_grower = Grower(widening, order, method, seed)
        for grower in (self, start_grower):
            for mixing in grower.mixing.values():
                mixing.data[self.source.layers :] = 0.0

        self.start = start
        # In a tuple, which torch does not search: its maps are no parameters of this module.
        self.start_grower = (start_grower,)
        self.residuals: dict[Key, Tensor] = {}

    def _compute_role(
        self, role: str, layers: Sequence[int | None], maps: Maps
    ) -> list[Float[Tensor, "*axes"]]:
        by_maps = super()._compute_role(role, layers, maps)
        return [
            value + self._compute_residual((role, layer))
            for value, layer in zip(by_maps, layers, strict=True)
        ]

    @torch.no_grad()
    def _compute_residual(self, key: Key) -> Float[Tensor, "*new"]:
        """What the direct copy has beyond the maps as they begin, in one tensor."""
        if key in self.residuals:
            return self.residuals[key]
        copy = self.start.tensors[key].read().float()
        residual = copy - self.start_grower[0].compute_tensor(key)
        # Fitting needs it at every step; for one pass over the model it would only fill memory.
        if self.layers.stacks:
            self.residuals[key] = residual
        return residual
