"""Steps that lineage.json names, done again."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..export.step import Export
from ..mixers.remix import Remix
from .sizes_to_steps import cast_checkpoint


def replay_step(checkpoint: Checkpoint, name: str, arguments: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint after one step of lineage.json; any error where this version has no such step.

    Args:
        checkpoint: what the step is done on.
        name: of the step's class.
        arguments: its fields.
    """
    if name == "Store":
        return cast_checkpoint(checkpoint, arguments["dtype"])
    if name == Remix.__name__:
        return Remix(**arguments)(checkpoint)
    if name == Export.__name__:
        return Export(**arguments)(checkpoint)
    package = importlib.import_module("regraft.growth.steps")
    for module in pkgutil.iter_modules(package.__path__):
        step = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), name, None)
        if isinstance(step, type):
            made: Checkpoint = step(**arguments)(checkpoint)
            return made
    raise RegraftError(f"this version of regraft has no step '{name}': make the model again")
