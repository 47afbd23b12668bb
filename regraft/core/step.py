"""What a step is."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from .checkpoint import Checkpoint


@runtime_checkable
class Step(Protocol):
    """A frozen dataclass that turns a checkpoint into another; its docstring says `Preserves:` and
    `Refuses:`.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The changed checkpoint; nothing is computed before its tensors are read."""


def step_entry(step: Any) -> dict[str, Any]:
    """A step as lineage.json keeps it: its name and all arguments."""
    return {"step": type(step).__name__, "arguments": dataclasses.asdict(step)}
