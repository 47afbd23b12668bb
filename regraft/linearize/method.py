"""What a method of linearization consists of, and how one is found by the name of its file."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from ..errors import RegraftError, suggest
from ..io.typed import convert, convert_fields
from ..mixers.remix_options import RemixOptions
from ..train.stage import Stage


@dataclass(frozen=True)
class StageShare:
    """One training stage of a method.

    Attributes:
        kind: of the stage, see `Stage.kind`.
        share: of all tokens that are trained on.
        fields: further fields of the `Stage`.
        longer: rows are longer than those of the first stage by this factor.
    """

    kind: str
    share: float
    fields: dict[str, Any] = field(default_factory=dict)
    longer: int = 1


@dataclass(frozen=True)
class Method:
    """A method of linearization.

    The docstring of its file names the paper, what differs from it here, and what is known of
    patents and licences.

    Attributes:
        remix: what is replaced by what.
        legs: training stages in order; their shares add up to 1.
        calibration: tokens of the closed-form start, 0 for none.
        unmeasured: what `keep` is where there is no text to measure layers on; None when `keep`
            needs none.
    """

    remix: RemixOptions
    legs: tuple[StageShare, ...]
    calibration: int = 0
    unmeasured: str | None = None

    def __post_init__(self) -> None:
        assert abs(sum(leg.share for leg in self.legs) - 1) < 1e-9

    def stages(self, tokens: int, length: int = 1024, batch: int = 1) -> list[Stage]:
        """The stages of a budget; the arguments are those of `stage_fields`."""
        return [Stage(**fields) for fields in self.stage_fields(tokens, length, batch)]

    def stage_fields(self, tokens: int, length: int = 1024, batch: int = 1) -> list[dict[str, Any]]:
        """The fields of each `Stage` that are not its defaults.

        Args:
            tokens: of all stages together; each gets its share, in whole steps.
            length: tokens of a row in the first stage.
            batch: rows of a step.

        RegraftError when a stage has not one step.
        """
        if min(length, batch) < 1:
            raise RegraftError(f"rows of {length} tokens, {batch} a step: give 1 or more of each")

        fields = []
        for leg in self.legs:
            row = leg.longer * length
            step = row * batch  # tokens of a step
            steps = round(leg.share * tokens / step)

            if steps < 1:
                raise RegraftError(
                    f"{tokens} tokens leave stage '{leg.kind}' with its share of {leg.share:g} "
                    f"less than a step of {batch} x {row}: give {round(step / leg.share)} or more, "
                    "or shorter rows"
                )

            sizes = {"kind": leg.kind, "tokens": steps * step, "length": row, "batch": batch}
            fields.append({**sizes, **leg.fields})
        return fields

    def with_remix(self, **given: Any) -> Method:
        """The method with other fields of its Remix; None leaves a field as it is.

        Another mixer begins without the options of the method's own, which it would not know.
        """
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("mixer", self.remix.mixer) != self.remix.mixer:
            given = {"options": {}, "inherit": "all"} | given
        remix = dataclasses.replace(self.remix, **given)
        unmeasured = None if "keep" in given else self.unmeasured
        return dataclasses.replace(self, remix=remix, unmeasured=unmeasured)

    def without_text(self) -> tuple[Method, list[str]]:
        """(the method where there is no text to measure layers on, notes for the user)."""
        if self.unmeasured is None:
            return self, []
        note = (
            f"--keep {self.unmeasured} here; linearize with --data measures which layers to keep "
            f"({self.remix.keep})"
        )
        return self.with_remix(keep=self.unmeasured), [note]


def list_methods() -> list[str]:
    """Every method's name: the files of `linearize/methods`."""
    package = importlib.import_module("regraft.linearize.methods")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def find_method(name: str) -> Method:
    """The method with a name; RegraftError naming the known ones when there is none."""
    if name not in list_methods():
        name = f"{name:.60}" if isinstance(name, str) else repr(name)[:60]
        hint = suggest(name, list_methods())
        raise RegraftError(f"unknown method '{name}': {hint}use one of {', '.join(list_methods())}")
    method: Method = importlib.import_module(f"regraft.linearize.methods.{name}").method
    return method


def expand_method(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe with `method` written out as remix, calibration and stages.

    What the recipe says itself wins.

    Args:
        fields: the recipe. With `method` it has `tokens`, unless it has stages, and may have
            `length` and `batch`. One without `method` is returned as it is.

    RegraftError for an unknown method, a remix without keys, or tokens that are no whole number.
    """
    if "method" not in fields:
        return fields
    own_keys = ("method", "tokens", "length", "batch")
    rest = {key: value for key, value in fields.items() if key not in own_keys}
    remix = convert_fields(RemixOptions, rest.pop("remix", None) or {}, "remix")
    if "stages" not in rest and type(fields.get("tokens")) is not int:
        raise RegraftError(
            f"method {fields['method']!r:.60} needs tokens, a whole number: "
            f"got {fields.get('tokens')!r:.60}"
        )

    method = find_method(fields["method"]).with_remix(**remix)
    expanded = {"remix": dataclasses.asdict(method.remix), "calibration": method.calibration}
    if "stages" not in rest:
        sizes = {
            key: convert(fields[key], int, key) for key in ("length", "batch") if key in fields
        }
        expanded["stages"] = method.stage_fields(fields["tokens"], **sizes)
    return expanded | rest


def expand_method_block(
    fields: dict[str, Any], tokens: int, length: int, batch: int
) -> dict[str, Any]:
    """The same for `linear` of an arm, where a Remix's fields, calibration and stages are mixed.

    Args:
        fields: the block. One without `method` is returned as it is.
        tokens: budget of the arm.
        length: tokens of a row.
        batch: rows of a step.
    """
    if "method" not in fields:
        return fields
    rest = {key: value for key, value in fields.items() if key in ("calibration", "stages")}
    remix = convert_fields(
        RemixOptions, {k: v for k, v in fields.items() if k not in rest and k != "method"}, "linear"
    )

    method = find_method(fields["method"]).with_remix(**remix)
    expanded = dataclasses.asdict(method.remix) | {"calibration": method.calibration}
    if "stages" not in rest:
        expanded["stages"] = method.stage_fields(tokens, length, batch)
    return expanded | rest
