"""What a verb gives back to the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """The JSON object, how to show it to a person, the exit code."""

    data: dict[str, Any]
    show: Callable[[Console], None] | None = None
    code: int = 0
