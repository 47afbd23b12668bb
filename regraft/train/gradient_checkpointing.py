"""Gradient checkpointing (Chen et al., arXiv 1604.06174): activations are computed twice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import RegraftError
from ..modeling.flops import pause_counting
from .layer_subset import layer_stack


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a layer's forward pass and for its repetition, whose FLOPs do not count."""
    return nullcontext(), pause_counting()


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
            checkpoint, use_reentrant=False, context_fn=checkpoint_contexts
        )
