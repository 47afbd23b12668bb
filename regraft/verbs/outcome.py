"""What a verb gives back to the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """The JSON object, how to show it to a person, the exit code."""

    data: dict[str, Any]
    show: Callable[[Console], None] | None = None
    code: int = 0


def idle(verb: Callable[..., Outcome], given: Mapping[str, Any], names: Sequence[str], say: str) -> None:
    """RegraftError, ending in `say`, when one of these arguments of a verb was given though nothing would read it."""
    usual = inspect.signature(verb).parameters
    said = [f"--{name.replace('_', '-')} {given[name]}" for name in names if given[name] != usual[name].default]
    if said:
        raise RegraftError(f"{', '.join(said)} would change nothing: {say}")
