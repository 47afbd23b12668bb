"""The teacher's attention inputs and outputs, layer by layer, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..mixers.base import MixerContext

Rotary = tuple[Tensor, Tensor]


@dataclass
class LayerRecord:
    """What one attention slot saw and gave: inputs and outputs (batch, time, hidden), the rotary tables, the softmax
    matrices (batch, heads, time, time) where the model gives them."""

    inputs: Tensor
    outputs: Tensor
    rotary: Rotary | None
    weights: Tensor | None = None

    def mixer_context(self, segments: Tensor | None) -> MixerContext:
        """The context a mixer in this slot would get."""
        return MixerContext(self.rotary, None, segments)


@contextmanager
def record_layers(
    slots: list[nn.Module], layers: list[int], keep: Callable[[int, LayerRecord], None]
) -> Iterator[None]:
    """While inside, every forward of slot `layer` calls `keep(layer, record)`."""

    def build_hook(layer: int) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            weights = output[1].detach() if len(output) > 1 and torch.is_tensor(output[1]) else None
            keep(
                layer,
                LayerRecord(
                    inputs.detach(), output[0].detach(), kwargs.get("position_embeddings"), weights
                ),
            )

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
    """Run the decoder without its head, for what the hooks see; input_ids, position_ids: (batch, time)."""
    model.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
