"""What a JSON value must look like: checked against the annotations of a TypedDict or dataclass.

Every format on disk has one such class, and its reader checks the file against it. Python's types
stand for JSON's: `int` for a whole number below 2 to the 63rd, `float` for a finite number of
either kind, `tuple` and `set` for lists. Keys that the class does not have are tolerated, since a
newer version may add some.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, Never, NotRequired, Required, TypeAlias, Union

from ..errors import RegraftError

# A number that was measured, such as a loss: it may be NaN or infinity.
Measured: TypeAlias = Annotated[float, "any"]
INTEGER_LIMIT = 1 << 63  # what a tensor's index, a file's offset or NumPy can hold
VERSION = 1  # of all formats; files without the key `version` have this one
NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    Never: "there at all",
}


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Where a value differs from what was expected.

    Attributes:
        key: the path to it, such as `stages[2].tokens`; empty for the whole value.
        problem: what is wrong, with the value shortened.
    """

    key: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key} {self.problem}".strip()


def check_json(value: Any, kind: Any, where: str, remedy: str) -> Any:
    """The value; RegraftError, with key and value, when it does not fit `kind`.

    Args:
        value: as `json.loads` returns it.
        kind: a TypedDict, a dataclass, or any annotation made of them and of Python's types.
        where: the file, and perhaps the line, for the error.
        remedy: what the user can do.
    """
    if mismatch := find_mismatch(value, kind):
        raise RegraftError(f"{where}{':' if mismatch.key else ''} {mismatch}: {remedy}")
    return value


def check_version(value: Any, where: str) -> None:
    """RegraftError when a file of regraft's own was written by a newer version."""
    version = value.get("version", VERSION) if isinstance(value, dict) else VERSION
    if type(version) is not int or not 0 < version <= VERSION:
        raise RegraftError(
            f"{where}: version is {shorten(version)}, this regraft reads version {VERSION}: "
            "update regraft, or make the file again"
        )


def build(kind: Any, value: dict[str, Any]) -> Any:
    """A dataclass from the keys of a checked value that it has."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: item for key, item in value.items() if key in known})


def shorten(value: Any) -> str:
    """A value for an error message: cut to some 80 characters, on one line."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlong, short.maxlevel = 60, 60, 40, 2
    return short.repr(value)[:120]


def find_mismatch(value: Any, kind: Any, key: str = "") -> Mismatch | None:
    """The first place where a value differs from an annotation; None when it fits.

    Args:
        value: as `json.loads` returns it.
        kind: see `check_json`.
        key: path of the value, for the result.
    """
    if kind is Any or type(value) is kind and kind in (str, bool, type(None)):
        return None
    if kind in NAMES or kind == Measured or kind is None:
        return None if _fits_simple(value, kind) else _differs(value, kind, key)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _find_in_fields(value, kind, key)

    return _find_in_generic(value, kind, key)


def _find_in_generic(value: Any, kind: Any, key: str) -> Mismatch | None:
    """The first mismatch with a Literal, a union, a list, a tuple or a mapping."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        fits = any(value == option and type(value) is type(option) for option in inner)
        return None if fits else _differs(value, kind, key)
    if origin in (Union, types.UnionType):
        return _find_in_union(value, kind, key)

    if not isinstance(value, Mapping if issubclass(origin, Mapping) else (list, tuple)):
        return _differs(value, kind, key)
    if origin is tuple and inner[1:] != (...,) and len(inner) != len(value):
        return _differs(value, kind, key)
    return next(filter(None, _find_in_items(value, inner, key)), None)


def _fits_simple(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type; a bool is no number, although Python makes it one."""
    if kind is None:
        return value is None
    if kind is int:
        return type(value) is int and -INTEGER_LIMIT <= value < INTEGER_LIMIT
    if kind is float:
        return _fits_simple(value, int) or type(value) is float and math.isfinite(value)
    if kind == Measured:
        return _fits_simple(value, int) or type(value) is float
    return type(value) is kind


def _find_in_union(value: Any, kind: Any, key: str) -> Mismatch | None:
    found = [find_mismatch(value, option, key) for option in typing.get_args(kind)]
    if None in found:
        return None
    # Of several options that the value might have meant, the one that fits furthest down.
    deepest = max(filter(None, found), key=lambda mismatch: len(mismatch.key))
    is_specific = deepest.key != key or deepest.problem.startswith("lacks")
    return deepest if is_specific else _differs(value, kind, key)


def _find_in_items(value: Any, inner: tuple[Any, ...], key: str) -> Iterator[Mismatch | None]:
    """The mismatch, or None, of each item of a list or object."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield find_mismatch(item, inner[1] if inner else Any, join_key(key, name))
        return
    for number, item in enumerate(value):
        kind = inner[min(number, len(inner) - 1)] if inner else Any
        if kind is ...:
            kind = inner[0]
        yield find_mismatch(item, kind, f"{key}[{number}]")


def _find_in_fields(value: Any, kind: Any, key: str) -> Mismatch | None:
    if not isinstance(value, Mapping):
        return _differs(value, kind, key)
    for name, (hint, required) in list_fields(kind).items():
        if name in value:
            if mismatch := find_mismatch(value[name], hint, join_key(key, name)):
                return mismatch
        elif required:
            return Mismatch(key, f"lacks the key '{name}'")
    return None


@lru_cache(maxsize=256)
def list_fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name -> (annotation, whether it is required) of a TypedDict's or dataclass's fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        missing = dataclasses.MISSING
        return {
            field.name: (
                hints[field.name],
                field.default is missing and field.default_factory is missing,
            )
            for field in dataclasses.fields(kind)
            if field.init
        }

    # `__required_keys__` does not see Required and NotRequired in annotations that are strings.
    fields = {}
    for name, hint in hints.items():
        required = name in kind.__required_keys__
        if typing.get_origin(hint) in (Required, NotRequired):
            required = typing.get_origin(hint) is Required
            hint = typing.get_args(hint)[0]
        fields[name] = hint, required
    return fields


def join_key(key: str, name: object) -> str:
    """The path to an entry of an object at `key`."""
    shown = name if isinstance(name, str) and name.isidentifier() else shorten(name)
    return f"{key}.{shown}" if key else shown


def _differs(value: Any, kind: Any, key: str) -> Mismatch:
    return Mismatch(key, f"is {shorten(value)}, not {describe_kind(kind)}")


def describe_kind(kind: Any) -> str:
    """An annotation in words, for an error message."""
    if kind == Measured:
        return "a number"
    if kind in NAMES or kind is None:
        return NAMES[type(None) if kind is None else kind]
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_kind(option) for option in inner)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return "an object"
    return "an object" if issubclass(origin, Mapping) else "a list"
