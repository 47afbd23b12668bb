"""What a verb of the command line is, and what it gives back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from ..io.files import read_json_if_exists
from ..progress import print_line

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """What a verb gives back.

    Attributes:
        data: the JSON object that `--json` prints.
        show: prints the same for a person; None when the verb has printed all.
        code: the exit code, 0 done or 1 a check does not hold.
    """

    data: Mapping[str, Any]
    show: Callable[[Console], None] | None = None
    code: int = 0


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: the function behind it and how its help reads.

    Attributes:
        function: called with the parsed arguments; its signature and docstring make the parser.
        examples: two command lines, shown at the end of the help.
        sections: parameter names by section of the help; `other` has the rest.
        resumes: whether the same command goes on after an interruption.
        distributed: whether the processes of a torchrun do it as one.
    """

    function: Callable[..., Outcome]
    examples: tuple[str, str]
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    resumes: bool = False
    distributed: bool = False

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        first_paragraph = (self.function.__doc__ or "").strip().partition("\n\n")[0]
        return " ".join(first_paragraph.split()).rstrip(".")

    @property
    def positional(self) -> list[str]:
        """Parameters given by their place."""
        parameters = inspect.signature(self.function).parameters
        return [name for name, one in parameters.items() if one.default is one.empty]

    @property
    def optional(self) -> list[str]:
        """Parameters given as flags."""
        parameters = inspect.signature(self.function).parameters
        return [name for name, one in parameters.items() if one.default is not one.empty]

    @property
    def takes_overrides(self) -> bool:
        """Whether `--key.sub VALUE` overrides any field of the verb's recipe."""
        return "overrides" in self.optional


def check_unused_flags(
    verb: Callable[..., Outcome], given: Mapping[str, Any], names: Sequence[str], say: str
) -> None:
    """RegraftError, ending in `say`, when one of these arguments of a verb was given though nothing
    would read it.
    """
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
    print_line(f"wrote {name}")
