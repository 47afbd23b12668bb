"""What a step is: something that turns a checkpoint into another."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from .checkpoint import Checkpoint


@runtime_checkable
class Step(Protocol):
    """A frozen dataclass whose call turns a checkpoint into another.

    Its docstring says what stays the same (`Preserves:`) and what it refuses (`Refuses:`).
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The changed checkpoint; nothing is computed before its tensors are read."""


def step_entry(step: Any) -> dict[str, Any]:
    """A step as lineage.json keeps it (see `lineage.StepEntry`).

    Args:
        step: a dataclass, whose class name and fields are recorded.
    """
    return {"step": type(step).__name__, "arguments": dataclasses.asdict(step)}
