"""A mixer's options from a spec, each of its type."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from ..errors import RegraftError


def parse_options(name: str, kind: type, given: dict[str, Any]) -> Any:
    """The dataclass `kind` with the values that a spec gives; RegraftError names an unknown option or a wrong value."""
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise RegraftError(
            f"mixer '{name}' has no option '{unknown[0]}': it takes {', '.join(known)}"
        )
    for key, hint in typing.get_type_hints(kind).items():
        if key in given and not _fits(given[key], hint):
            words = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            wanted = (
                f"use one of {', '.join(words)}"
                if words
                else f"give {getattr(hint, '__name__', hint)}"
            )
            raise RegraftError(f"mixer '{name}': {key} is '{given[key]}', {wanted}")
    return kind(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON or YAML is of a type; a truth value is no number, a whole number is one."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if inner and origin is not dict:
        return any(_fits(value, part) for part in inner)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
