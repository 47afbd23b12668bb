"""Gradient checkpointing (Chen et al., arXiv 1604.06174): activations are computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import RegraftError
from ..modeling.flops import pause_counting
from ..modeling.mixer_slot import MixerSlot, RowLayout, hand_rows
from .layer_subset import layer_stack


def checkpoint_contexts(
    layer: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a layer's forward pass and for its repetition, whose FLOPs do not count."""
    slots = [part for part in layer.modules() if isinstance(part, MixerSlot)]
    return nullcontext(), _repeat(slots, slots[0].rows if slots else None)


@contextmanager
def _repeat(slots: list[MixerSlot], rows: RowLayout | None) -> Iterator[None]:
    """While a layer is computed again: its slots are told what they were told before."""
    with pause_counting(), hand_rows(slots, rows):
        yield


def set_gradient_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Keep only the layers' inputs for the backward pass, or all activations again.

    Results are the same. RegraftError when the layers cannot do that.
    """
    for layer in layer_stack(model):
        if not isinstance(layer, GradientCheckpointingLayer):
            if wanted:
                raise RegraftError(
                    f"a {type(layer).__name__} cannot be computed again: "
                    "train without checkpointing"
                )
            continue

        # transformers checkpoints a layer in training mode only. The layer's own flag is set, not
        # that of its parts: these stay in eval mode, without dropout.
        layer.gradient_checkpointing = layer.training = wanted
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=partial(checkpoint_contexts, layer)
        )
