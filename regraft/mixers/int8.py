"""Linear layers with int8 weights, for decoding on a processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.shapes import Float

LARGEST = 127
# Rows up to which PyTorch's kernel beats widening the weights for an ordinary product.
FEW = 16
# Inputs that the kernel reads at a time: it reads beyond the end of rows that have others.
BLOCK = 32


class Int8Linear(nn.Module):
    """y = x W^T + b, where W is int8 and each output has a scale.

    One row takes as long as its weights take to be read, a byte each instead of four. PyTorch's
    kernel reads inputs as bfloat16 and gives such outputs; for many rows the weights are widened.

    Attributes:
        int8: (outputs, inputs), and columns of zeros up to whole blocks.
        scale: (outputs), bfloat16: the kernel reads it so, and both ways shall have the same W.
        bias: (outputs), or None.
    """

    int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, int8: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = inputs, len(int8)
        self.register_buffer("int8", int8)
        self.register_buffer("scale", scale)
        self.bias = bias

    @classmethod
    def of(cls, layer: nn.Linear | Conv1D) -> Int8Linear:
        """The layer with weights rounded to the nearest of its outputs' 255 values."""
        # GPT-2's class stores (inputs, outputs).
        weight = layer.weight.detach().float()
        weight = weight.t() if isinstance(layer, Conv1D) else weight
        scale = weight.abs().amax(1) / LARGEST
        scale = torch.where(scale > 0, scale, 1).bfloat16()
        rounded = (weight / scale.float().unsqueeze(1)).round().clamp(-LARGEST, LARGEST)
        inputs = weight.shape[1]
        padded = nn.functional.pad(rounded.to(torch.int8), (0, -inputs % BLOCK))
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(inputs, padded.contiguous(), scale, bias)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """W, in float32; made anew for each reader."""
        return self.int8[:, : self.in_features].float() * self.scale.float().unsqueeze(1)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The layer's output, in the dtype of its input."""
        rows = x.reshape(-1, self.in_features)
        if not 0 < len(rows) <= FEW:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        rows = rows.bfloat16()
        spare = self.int8.shape[1] - self.in_features
        rows = nn.functional.pad(rows, (0, spare)) if spare else rows.contiguous()
        out = torch._weight_int8pack_mm(rows, self.int8, self.scale).to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)
