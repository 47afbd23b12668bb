"""What a way to linearize consists of, and the registry of them by file name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from ..errors import RegraftError
from ..mixers.remix import Remix
from ..train.stage import Stage


@dataclass(frozen=True)
class StageShare:
    """One stage: its kind, its share of all tokens, rows `longer` than the first length by this factor, and further
    fields of a Stage."""

    kind: str
    share: float
    fields: dict[str, Any] = field(default_factory=dict)
    longer: int = 1


@dataclass(frozen=True)
class Method:
    """A way to linearize. `calibration`: tokens of the closed-form start, 0 for none. `legs`: training stages in order,
    their shares adding up to 1. `unmeasured`: what `keep` is instead where there is no text to measure layers on. The
    docstring of the method's file has the paper, what differs from it here, and what is known of patents and licences.
    """

    remix: Remix
    legs: tuple[StageShare, ...]
    calibration: int = 0
    unmeasured: str | None = None

    def __post_init__(self) -> None:
        assert abs(sum(leg.share for leg in self.legs) - 1) < 1e-9

    def stages(self, tokens: int, length: int = 1024, batch: int = 1) -> list[Stage]:
        """The stages on a budget, in whole steps; RegraftError when a stage has not one step."""
        return [Stage(**words) for words in self.stage_fields(tokens, length, batch)]

    def stage_fields(self, tokens: int, length: int = 1024, batch: int = 1) -> list[dict[str, Any]]:
        """What `stages` says of each stage, the rest being a Stage's defaults."""
        made = []
        for leg in self.legs:
            size = leg.longer * length
            step = size * batch
            steps = round(leg.share * tokens / step)
            if steps < 1:
                raise RegraftError(
                    f"{tokens} tokens leave stage '{leg.kind}' with its share of {leg.share:g} less than a step of "
                    f"{batch} x {size}: give {round(step / leg.share)} or more, or shorter rows"
                )
            made.append(
                {
                    "kind": leg.kind,
                    "tokens": steps * step,
                    "length": size,
                    "batch": batch,
                    **leg.fields,
                }
            )
        return made

    def with_remix(self, **given: Any) -> Method:
        """With these fields of its Remix instead; None leaves one as it is. A mixer's options go with the mixer."""
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("mixer", self.remix.mixer) != self.remix.mixer:
            given = {"options": {}, "inherit": "all"} | given
        unmeasured = None if "keep" in given else self.unmeasured
        return dataclasses.replace(
            self, remix=dataclasses.replace(self.remix, **given), unmeasured=unmeasured
        )

    def without_text(self) -> tuple[Method, list[str]]:
        """(the method without text to measure layers on, what to tell about that)."""
        if self.unmeasured is None:
            return self, []
        note = f"--keep {self.unmeasured} here; linearize with --data measures which layers to keep ({self.remix.keep})"
        return self.with_remix(keep=self.unmeasured), [note]


def list_methods() -> list[str]:
    """Every method's name: the files of this folder."""
    package = importlib.import_module("regraft.linearize.methods")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def find_method(name: str) -> Method:
    """The method called `name`; RegraftError names the known ones."""
    if name not in list_methods():
        close = difflib.get_close_matches(name, list_methods(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise RegraftError(f"unknown method '{name}': {hint}use one of {', '.join(list_methods())}")
    made: Method = importlib.import_module(f"regraft.linearize.methods.{name}").method
    return made


def expand_method(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with `method`, `tokens`, `length` and `batch` spelt out as remix, calibration and stages; what
    the recipe says itself stays."""
    if "method" not in fields:
        return fields
    rest = {
        key: value
        for key, value in fields.items()
        if key not in ("method", "tokens", "length", "batch")
    }
    remix = rest.pop("remix", None) or {}
    if not isinstance(remix, dict):
        raise RegraftError(f"remix is {remix!r}: give keys with values, such as keep: none")
    if "stages" not in rest and not isinstance(fields.get("tokens"), int):
        raise RegraftError(
            f"method {fields['method']} needs tokens, a whole number: got {fields.get('tokens')!r}"
        )
    method = find_method(fields["method"]).with_remix(**remix)
    sizes = {key: fields[key] for key in ("length", "batch") if key in fields}
    made = {"remix": dataclasses.asdict(method.remix), "calibration": method.calibration}
    stages = {} if "stages" in rest else {"stages": method.stage_fields(fields["tokens"], **sizes)}
    return made | stages | rest


def expand_method_block(
    words: dict[str, Any], tokens: int, length: int, batch: int
) -> dict[str, Any]:
    """The same for a block that has a Remix's fields, `calibration` and `stages` side by side, as an arm's `linear`."""
    if "method" not in words:
        return words
    rest = {key: value for key, value in words.items() if key in ("calibration", "stages")}
    method = find_method(words["method"]).with_remix(
        **{k: v for k, v in words.items() if k not in rest and k != "method"}
    )
    stages = {} if "stages" in rest else {"stages": method.stage_fields(tokens, length, batch)}
    return dataclasses.asdict(method.remix) | {"calibration": method.calibration} | stages | rest
