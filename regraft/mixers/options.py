"""A mixer's options from a spec, each of its type."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import Any, Literal

from ..errors import RegraftError

LARGEST = 1 << 62  # of a number in an option


def parse_options(name: str, kind: type, values: dict[str, Any]) -> Any:
    """An options dataclass with the values of a spec.

    Args:
        name: of the mixer, for messages.
        kind: the dataclass.
        values: by option; what is left out has the dataclass's default.

    Raises RegraftError that names an unknown option or a value of the wrong type.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise RegraftError(
            f"mixer '{name}' has no option '{unknown[0]}': it takes {', '.join(known)}"
        )

    for key, hint in _find_hints(kind).items():
        if key in values and not _fits(values[key], hint):
            raise RegraftError(f"mixer '{name}': {key} is '{values[key]}', {_advice(hint)}")
    return kind(**values)


@cache
def _find_hints(kind: type) -> dict[str, Any]:
    """The types of an options dataclass's fields."""
    return typing.get_type_hints(kind)


def _advice(hint: Any) -> str:
    """What to give for an option of this type."""
    if typing.get_origin(hint) is Literal:
        return f"use one of {', '.join(typing.get_args(hint))}"
    return f"give {getattr(hint, '__name__', hint)}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON or YAML is of a type.

    An int is a float too. A bool is neither, although Python makes it an int.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if inner and origin is not dict:
        return any(_fits(value, part) for part in inner)
    if hint in (int, float):
        is_number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return is_number and abs(value) < LARGEST  # which NaN and infinity are not
    return isinstance(value, origin or hint)
