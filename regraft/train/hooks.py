"""The teacher's attention inputs and outputs, layer by layer, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..mixers.attention import split_complex
from ..mixers.base import MixerContext
from ..modeling.text_part import run_text_part

Rotary = tuple[Tensor, Tensor]  # cos and sin, both (batch or 1, time, rotary dim)


@dataclass
class LayerRecord:
    """What one attention module got and gave in a forward pass."""

    inputs: Tensor  # (batch, time, hidden)
    outputs: Tensor  # (batch, time, hidden)
    rotary: Rotary | None  # None for a model with other positions
    weights: Tensor | None = None  # softmax matrices (batch, heads, time, time), if it gives them

    def mixer_context(self, segments: Tensor | None) -> MixerContext:
        """The context that a mixer in this place would get."""
        return MixerContext(self.rotary, None, segments)


@contextmanager
def record_layers(
    slots: list[nn.Module], layers: list[int], keep: Callable[[int, LayerRecord], None]
) -> Iterator[None]:
    """Inside, every forward pass of an attention module calls `keep(layer, record)`.

    Args:
        slots: the model's attention modules, by layer.
        layers: which of them are recorded.
        keep: gets detached tensors.
    """

    def build_hook(layer: int) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            # Some classes pass the hidden states by name, others by position.
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            gives_weights = len(output) > 1 and torch.is_tensor(output[1])
            weights = output[1].detach() if gives_weights else None
            rotary = split_complex(kwargs.get("position_embeddings"))
            keep(layer, LayerRecord(inputs.detach(), output[0].detach(), rotary, weights))

        return record

    handles = [
        slots[layer].register_forward_hook(build_hook(layer), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_decoder(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> None:
    """Run the decoder without its head, for what hooks record; both arguments (batch, time)."""
    run_text_part(model, position_ids, input_ids=input_ids)
