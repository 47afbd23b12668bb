"""What a target of an export consists of, and how one is found by the name of its file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.anatomy import Config
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, suggest


@dataclass(frozen=True)
class ExportTarget:
    """A form that a model can be exported in.

    Attributes:
        name: of its file in `export/targets`.
        loads: what opens the result.
        find_misfits: config of a model -> what of it the target cannot hold, a line each, with the
            keys or flags that matter. Nothing: it holds the model.
        convert: a model that fits, in the target's form.
        remix: fields of a `Remix` that makes models which fit.
        choose_options: config of a source -> further options of the mixer in `remix`.
        code: whether the result needs `import regraft.modeling` or `trust_remote_code`.
    """

    name: str
    loads: str
    find_misfits: Callable[[Config], list[str]]
    convert: Callable[[Checkpoint], Checkpoint]
    remix: dict[str, Any] = field(default_factory=dict)
    choose_options: Callable[[Config], dict[str, Any]] = lambda config: {}
    code: bool = False

    def build_remix(self, config: Config) -> dict[str, Any]:
        """Fields of a `Remix` that makes a model which fits, of a source with a config."""
        options = {**self.remix.get("options", {}), **self.choose_options(config)}
        return {**self.remix, **({"options": options} if options else {})}

    def check_holds(self, checkpoint: Checkpoint) -> None:
        """RegraftError that says what of a model the target cannot hold."""
        if misfits := self.find_misfits(checkpoint.config):
            raise RegraftError(
                f"{self.name} cannot hold '{checkpoint.origin}': {'; '.join(misfits)}"
            )


def list_targets() -> list[str]:
    """Every target's name: the files of `export/targets`."""
    package = importlib.import_module("regraft.export.targets")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def find_target(name: str) -> ExportTarget:
    """The target with a name; RegraftError naming the known ones when there is none."""
    if name not in list_targets():
        hint = suggest(f"{name:.60}", list_targets())
        raise RegraftError(
            f"unknown target '{name:.60}': {hint}use one of {', '.join(list_targets())}"
        )
    target: ExportTarget = importlib.import_module(f"regraft.export.targets.{name}").target
    return target
