"""A mixer's options from a spec, each of its type."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from ..errors import RegraftError
from ..io.schema import find_mismatch


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

    for key, hint in typing.get_type_hints(kind).items():
        if key in values and find_mismatch(values[key], hint):
            raise RegraftError(f"mixer '{name}': {key} is '{values[key]}', {_advice(hint)}")
    return kind(**values)


def _advice(hint: Any) -> str:
    """What to give for an option of this type."""
    if typing.get_origin(hint) is Literal:
        return f"use one of {', '.join(typing.get_args(hint))}"
    return f"give {getattr(hint, '__name__', hint)}"
