"""Linear layers that read one input, as one product for one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.shapes import Float
from .int8 import Int8Linear

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


class PackedInt8:
    """Layers with the same inputs as one, of whose weights theirs are views; see `PackedLinears`.

    Args:
        layers: whose outputs are wanted.
    """

    def __init__(self, layers: list[Int8Linear]):
        self.layers, self.widths = layers, [layer.out_features for layer in layers]
        bias = None
        if any(layer.bias is not None for layer in layers):
            zeros = (torch.zeros(width) for width in self.widths)
            parts = zip((layer.bias for layer in layers), zeros, strict=True)
            bias = torch.cat([zero if own is None else own for own, zero in parts])
        int8, scale = (
            torch.cat([getattr(one, name) for one in layers]) for name in ("int8", "scale")
        )
        for layer, part in zip(layers, int8.split(self.widths), strict=True):
            layer.int8 = part
        self.whole = Int8Linear(layers[0].in_features, int8, scale, bias)

    def holds(self) -> bool:
        """Yes: such weights do not change."""
        return True

    def __call__(self, x: Float[Tensor, "batch time hidden"]) -> dict[nn.Module, Tensor]:
        """Each layer's output (batch, time, outputs)."""
        return dict(zip(self.layers, self.whole(x).split(self.widths, -1), strict=True))


Packed = PackedLinears | PackedInt8


def pack_linears(layers: Sequence[nn.Module]) -> Packed | None:
    """Layers with the same inputs as one; None where there are not several of one class.

    Args:
        layers: of any classes; subclasses may compute more than a product and are left alone.
    """
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    int8 = [layer for layer in layers if isinstance(layer, Int8Linear)]
    if len(layers) == len(linear) > 1:
        return PackedLinears(linear)
    return PackedInt8(int8) if len(layers) == len(int8) > 1 else None
