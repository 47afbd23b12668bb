"""What a verb of the command line is, and what it gives back."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from ..io import output
from ..io.files import replace_file
from ..progress import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from ..growth.sizes_to_steps import Growth

PLOT_MARK = b"<!-- drawn by regraft -->\n"  # the last line of a picture

MODELS = (
    "source",
    "model",
    "baseline",
    "against",
    "teacher",
    "verify",
)  # parameters that are models


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
        pushes: whether its output is a model that `--push-to-hub` may upload.
    """

    function: Callable[..., Outcome]
    examples: tuple[str, str]
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    resumes: bool = False
    distributed: bool = False
    pushes: bool = False

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
    def source(self) -> str | None:
        """The parameter that is the path of a model and that `--variant` is about, if any."""
        return next((name for name in self.positional if name in ("source", "model")), None)

    @property
    def models(self) -> list[str]:
        """Parameters that are models: a path, or a name on the hub."""
        parameters = inspect.signature(self.function).parameters
        names = (*self.positional, *self.optional)
        # `bench --verify` is a switch.
        return [name for name in names if name in MODELS and parameters[name].default is not False]

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
        f"--{name.strip('_').replace('_', '-')} {given[name]}"
        for name in names
        if given[name] != usual[name].default
    ]
    if said:
        raise RegraftError(f"{', '.join(said)} would change nothing: {say}")


def check_apart(given: Mapping[str, Any], inputs: Sequence[str]) -> Path:
    """The real path of a verb's output; RegraftError when it is not apart from what is read.

    Args:
        given: the verb's arguments by name.
        inputs: names of arguments that are paths, or texts: several paths with commas between,
            or patterns.
    """
    pairs = []
    for name in inputs:
        for piece in str(given[name] or "").split(","):
            found = glob.glob(piece) if glob.has_magic(piece) else [piece]
            pairs += [(f"{name.replace('_', ' ')}", path) for path in found if path]
    return output.check_apart(given["out"], pairs)


def check_folders(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """RegraftError for a flag that takes a folder and was given a file.

    Args:
        given: the verb's arguments by name.
        names: of the flags.
    """
    for name in names:
        path = Path(given[name]) if given[name] else None
        if path is not None and os.path.lexists(path) and not path.is_dir():
            flag = name.replace("_", "-")
            raise RegraftError(f"--{flag} '{path}' is no folder: give a folder, or a new name")


def describe_request(
    verb: Callable[..., Outcome],
    given: Mapping[str, Any],
    inputs: Sequence[str],
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that a command was asked for and that decides its result, by argument.

    Args:
        verb: the command's function.
        given: its arguments by name.
        inputs: names of arguments that are paths of what is read.
        ignored: further arguments that decide nothing, beside the output and how it is shown.
    """
    left_out = {"out", "overwrite", "json", "trust_remote_code", *ignored}
    names = [name for name in inspect.signature(verb).parameters if name not in left_out]
    asked = {name: given[name] for name in names if name not in inputs}
    found = {name: identify_input(name, given[name]) for name in inputs if given[name]}
    return {"verb": verb.__name__, **asked, "inputs": found}


def identify_input(name: str, given: str) -> dict[str, str]:
    """The identity of an input: a model, a text, or a file or folder with a config.json.

    Args:
        name: of the argument.
        given: the path. What is not there is refused by what reads it.
    """
    from ..data.files import find_files
    from ..io.identity import identify_file, identify_files, identify_model

    if name == "source":
        return identify_model(given)
    if name == "data" and Path(given).suffix != ".npz":
        return identify_files(find_files(given))
    path = Path(given)
    file = path / "config.json" if path.is_dir() else path
    return {"file": identify_file(file)} if file.is_file() else {}


def split_keys(text: str | None) -> tuple[str, ...]:
    """The keys in a list with commas."""
    return tuple(filter(None, (key.strip() for key in (text or "").split(","))))


def build_growth(given: Mapping[str, Any]) -> Growth:
    """The growth that the flags of a verb ask for.

    Args:
        given: the verb's arguments by name.
    """
    from ..growth.new_tokens import read_new_tokens
    from ..growth.sizes_to_steps import Growth

    taken = split_keys(given["adopt"])
    tokens = read_new_tokens(given["add_tokens"]) if given["add_tokens"] else ()
    names = {one.name for one in fields(Growth)} & given.keys()
    named = {name: given[name] for name in names}
    return Growth(**named | {"adopt": taken, "tokens": tokens})


def name_method(method: str | None, target: str | None) -> str:
    """The method of a verb: the one given, else what trains the form of a target, else auto."""
    from ..export.target import find_target

    if method:
        return method
    return find_target(target).method if target else "auto"


def remix_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of a verb change of a method's Remix: those that were given, and what a target
    of `--for` needs where they were not.

    RegraftError for an unknown target, and for sink tokens that the mixer does not have.

    Args:
        given: the verb's arguments by name.
    """
    from ..export.target import find_target
    from ..mixers.registry import mixer_class

    changes = {
        name: given[name] for name in ("mixer", "keep", "window", "sinks", "options", "inherit")
    }
    if given["for_"]:
        wanted = find_target(given["for_"]).remix
        own_mixer = changes["mixer"] in (None, wanted.get("mixer"))
        for name, value in wanted.items():
            if name == "options":  # of its mixer; those that were given stand before the target's
                changes[name] = {**value, **(changes[name] or {})} if own_mixer else changes[name]
            elif changes[name] is None:
                changes[name] = value
    kind = mixer_class(changes["mixer"]) if changes["mixer"] else None
    names = [one.name for one in fields(kind.Options)] if kind else []
    takes_sinks = kind is None or not kind.is_window or "sinks" in names
    if given["sinks"] and not takes_sinks:
        raise RegraftError(
            f"--sinks {given['sinks']} would change nothing: the mixer {changes['mixer']} has a"
            " learned sink in the place of first tokens, leave it out"
        )
    return changes


def experiment_outcome(numbers: dict[str, Any], out: str) -> Outcome:
    """The end of an experiment: its table and where the page is."""

    def show(console: Console) -> None:
        from pathlib import Path

        from ..report import tables
        from ..train import ledger, monitor

        start = ledger.read_start_costs(Path(out))
        tables.print_evaluation(numbers["eval"], console)
        console.print(tables.training_table(monitor.summarize_stages(out), start))
        console.print(tables.speed_table(numbers["bench"]))
        console.print(f"Report: {out}/report.html", soft_wrap=True, highlight=False)

    return Outcome(numbers, show)


def format_check(source: str, out: str) -> str:
    """The command that compares a model with what was made from it.

    Args:
        source: path of the model, which may stand for one with an adapter.
        out: what was made.
    """
    from ..io.adapted import read_adapted
    from ..io.hub import display_name

    known = read_adapted(source)
    if known is None:
        return f"regraft check {display_name(source)} {out}"
    return f"regraft check {display_name(known['base'])} {out} --adapter {known['adapter']}"


def check_plot(name: str) -> None:
    """RegraftError when a file of this name is in the current folder that `write_plot` did not
    write.
    """
    file = Path(name)
    if file.is_symlink() or (file.exists() and PLOT_MARK not in file.read_bytes()[-100:]):
        raise RegraftError(
            f"'{file.absolute()}' is there and not of regraft: move it, or run this in another "
            "folder"
        )


def write_plot(name: str, picture: bytes) -> None:
    """Write a picture into the current folder and say so."""
    check_plot(name)
    with replace_file(Path(name)) as part:
        part.write_bytes(picture + PLOT_MARK)
    print_line(f"wrote {name}")
