"""Linear layers that read one input, as one product for one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.shapes import Float

# What layers gave already for the tokens at hand.
Projected = Mapping[nn.Module, Tensor]


class PackedLinears:
    """Linear layers whose weights are the columns of one matrix, of which they are views.

    A product with one row takes as long as its weights take to be read. A processor's libraries
    read a wide matrix (inputs, outputs) about twice as fast as several narrow ones that are stored
    (outputs, inputs).

    Args:
        layers: with the same inputs; their parameters stay the same objects with the same values.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers, self.widths = list(layers), [layer.out_features for layer in layers]
        self.matrix = torch.cat([layer.weight.data for layer in layers]).t().contiguous()
        self.bias: Tensor | None = None
        for layer, part in zip(layers, self.matrix.split(self.widths, 1), strict=True):
            layer.weight.data = part.t()
        if any(layer.bias is not None for layer in layers):
            self.bias = self.matrix.new_zeros(sum(self.widths))
            for layer, part in zip(layers, self.bias.split(self.widths), strict=True):
                if layer.bias is not None:
                    layer.bias.data = part.copy_(layer.bias.data)
        self.places = self._find_places()

    def holds(self) -> bool:
        """Whether the layers' parameters are views of the matrix still."""
        return self.places == self._find_places()

    def _find_places(self) -> list[tuple[int, int]]:
        """Which parameter each layer has, and where its numbers are."""
        parameters = (p for layer in self.layers for p in layer._parameters.values())
        return [(id(p), p.data_ptr()) for p in parameters if p is not None]

    def __call__(self, x: Float[Tensor, "batch time hidden"]) -> dict[nn.Module, Tensor]:
        """Each layer's output (batch, time, outputs), for reading only: no gradient goes back."""
        rows = x.flatten(0, 1)
        out = rows @ self.matrix if self.bias is None else self.bias.addmm(rows, self.matrix)
        parts = out.view(*x.shape[:2], -1).split(self.widths, -1)
        return dict(zip(self.layers, parts, strict=True))
