"""What a verb gives back to the command line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from ..io.files import read_json_if_exists

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """The JSON object, how to show it to a person, the exit code."""

    data: Mapping[str, Any]
    show: Callable[[Console], None] | None = None
    code: int = 0


def check_unused_flags(
    verb: Callable[..., Outcome], given: Mapping[str, Any], names: Sequence[str], say: str
) -> None:
    """RegraftError, ending in `say`, when one of these arguments of a verb was given though nothing would read it."""
    usual = inspect.signature(verb).parameters
    said = [
        f"--{name.replace('_', '-')} {given[name]}"
        for name in names
        if given[name] != usual[name].default
    ]
    if said:
        raise RegraftError(f"{', '.join(said)} would change nothing: {say}")


def experiment_outcome(numbers: dict[str, Any], out: str) -> Outcome:
    """The end of an experiment: its table and where the page is."""

    def show(console: Console) -> None:
        from pathlib import Path

        from ..report import tables
        from ..train import monitor

        spent = read_json_if_exists(Path(out) / "ledger.json") or {}
        tables.print_evaluation(numbers["eval"], console)
        console.print(tables.training_table(monitor.summarize_stages(out), spent.get("start", ())))
        console.print(tables.speed_table(numbers["bench"]))
        console.print(f"Report: {out}/report.html", soft_wrap=True, highlight=False)

    return Outcome(numbers, show)


def write_plot(name: str, picture: bytes) -> None:
    """Write a picture into the current folder and say so."""
    Path(name).write_bytes(picture)
    print(f"regraft: wrote {name}", file=sys.stderr)
