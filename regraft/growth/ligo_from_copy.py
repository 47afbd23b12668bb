"""Learned maps beside random weights: a direct copy in which old weights reach the new ones by maps
that learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint
from .depth import LayerOrigin
from .ligo import Grower, Maps
from .ligo_maps import Ligo
from .widening import Widening


class GrowerFromCopy(Grower):
    """What the maps give, and what `start` has beyond the maps as they begin: before any step it is
    `start`.

    Layers beyond the source's begin without a share of old ones: they are the start's alone.
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
        begun = Grower(widening, order, method, seed)
        for grower in (self, begun):
            for mixing in grower.mixing.values():
                mixing.data[self.source.layers :] = 0.0
        self.start = start
        self.first = (begun,)  # in a tuple: its maps are no parameters of this one
        self.rest: dict[Key, Tensor] = {}

    def _compute_role(self, role: str, layers: Sequence[int | None], maps: Maps) -> list[Tensor]:
        made = super()._compute_role(role, layers, maps)
        return [
            value + self._compute_residual((role, layer))
            for value, layer in zip(made, layers, strict=True)
        ]

    @torch.no_grad()
    def _compute_residual(self, key: Key) -> Tensor:
        if key in self.rest:
            return self.rest[key]
        value = self.start.tensors[key].read().float() - self.first[0].compute_tensor(key)
        if self.stacks:  # held in memory while the maps are fitted
            self.rest[key] = value
        return value
