"""Any use of a sharded model as one forward pass of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
WRAPPER_KEY = (
    "_regraft_whole"  # in the model's own dict: as a submodule it would hold the model twice
)


class ForwardWrapper(nn.Module):
    """Runs anything that uses a model as one forward pass: FSDP then gathers what is needed, and shares gradients.

    The losses here read parts of a model (the decoder without its head, the head's matrix), which FSDP's hooks on the
    model's own forward would not see.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[], Any]) -> Any:
        """What `act` gives."""
        return act()


def run_in_forward(model: nn.Module, act: Callable[[], T]) -> T:
    """`act()`, which uses `model`; of a sharded model within its forward pass."""
    made: T = vars(model)[WRAPPER_KEY](act) if WRAPPER_KEY in vars(model) else act()
    return made


def reshard_model(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one has left gathered; parameters are shards again."""
    if WRAPPER_KEY in vars(model):
        vars(model)[WRAPPER_KEY].reshard()
