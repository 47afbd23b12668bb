"""Run anything that uses a sharded model as one forward pass of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")

# Key in the model's own `__dict__`. As a registered submodule, the wrapper would hold the model
# and the model the wrapper, and every parameter would be listed twice.
WRAPPER_KEY = "_regraft_whole"


class ForwardWrapper(nn.Module):
    """A module whose forward pass is any function that uses the model.

    FSDP gathers weights and reduces gradients in hooks on `forward`. The losses here use parts of
    a model (the decoder without its head, the head's matrix), which hooks on the model's own
    forward would miss.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        """Call `function`, which uses the model."""
        return function()


def run_in_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call `function`, which uses `model`; inside its forward pass when the model is sharded."""
    if WRAPPER_KEY not in vars(model):
        return function()
    result: T = vars(model)[WRAPPER_KEY](function)
    return result


def reshard_model(model: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward pass has left gathered."""
    if WRAPPER_KEY in vars(model):
        vars(model)[WRAPPER_KEY].reshard()
