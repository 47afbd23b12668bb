"""Dataclasses from plain data: every value gets the type that its field declares, or is refused.

Nothing here looks a name up or imports anything. A recipe decides values, never which class or
function they go to: that is written in the dataclasses alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..errors import RegraftError
from .yaml_loader import check_plain, parse_yaml

# Keys by which parsers of command lines let a file name a class to be imported and called.
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs", "__path__")
KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def build_dataclass(schema: type, fields: Any) -> Any:
    """A dataclass from a mapping, with the dataclasses inside it.

    Text becomes a number where the field is one (`"1e-3"`), whole numbers become text where it is
    text (`keep: 0`). Free-form fields (`dict[str, Any]`) take any plain value.

    Args:
        schema: the dataclass.
        fields: its values by name; what is left out has its default.

    RegraftError that names the key and the value: for an unknown or missing key, a value of the
    wrong type, a key that names a class, and anything that is no plain value.
    """
    refuse_class_keys(fields)
    return convert(fields, schema)


def parse_mapping(text: str, what: str) -> dict[str, Any]:
    """The mapping that a flag's text in JSON or YAML stands for.

    Args:
        text: the text.
        what: the flag, for messages.

    RegraftError as of `build_dataclass` and `parse_yaml`.
    """
    value = parse_yaml(text, what)
    if not isinstance(value, dict):
        raise RegraftError(f"{what} is {text!r:.60}: give a mapping such as '{{\"key\": 1}}'")
    refuse_class_keys(value, what)
    parsed: dict[str, Any] = convert(value, dict[str, Any], what)
    return parsed


def convert_fields(schema: type, fields: Any, place: str = "") -> dict[str, Any]:
    """Some fields of a dataclass, each of its type; those that are left out stay left out.

    Args:
        schema: the dataclass.
        fields: values by name.
        place: dotted keys that lead to the mapping, for messages.
    """
    refuse_class_keys(fields, place)
    return _convert_fields(_parse_block(fields, place), schema, place, schema)


def refuse_class_keys(value: Any, place: str = "") -> None:
    """RegraftError for a key anywhere in plain data that would name a class to call.

    Args:
        value: the data.
        place: dotted keys that lead to it.
    """
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for key, part in parts:
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping) and key in CLASS_KEYS:
            raise RegraftError(
                f"'{where}' would name code to run ({part!r:.60}), and nothing from a file is "
                "run: remove the key"
            )
        refuse_class_keys(part, where)


def convert(value: Any, kind: Any, place: str = "", root: type | None = None) -> Any:
    """A plain value as the type of its field.

    Args:
        value: plain data.
        kind: the type.
        place: dotted keys that lead to the value, for messages; empty at the top.
        root: the outermost dataclass, whose keys an unknown one is compared with; None: `kind`.
    """
    root = root or kind
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, kind, place, root)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, inner, place, root)
    if origin is Literal:
        if value not in inner:
            raise _wrong_value(value, f"use one of {', '.join(map(str, inner))}", place)
        return value
    if origin is list:
        rows = _parse_text(value, place)
        if not isinstance(rows, list):
            raise _wrong_value(value, "give a list", place)
        return [convert(row, inner[0], f"{place}.{i}", root) for i, row in enumerate(rows)]
    if origin is dict:
        return {
            key: convert(part, inner[1], f"{place}.{key}", root)
            for key, part in _parse_block(value, place).items()
        }
    if kind is Any:
        check_plain(value, f"'{place}'")
        return _parse_scalar(value, place)
    return _convert_scalar(value, kind, place)


def _convert_dataclass(value: Any, kind: Any, place: str, root: type) -> Any:
    values = _convert_fields(_parse_block(value, place), kind, place, root)
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.name not in values and _is_required(field)
    ]
    if missing:
        where = f" in '{place}'" if place else ""
        raise RegraftError(f"required keys are missing{where}: give {', '.join(missing)}")
    return kind(**values)


def _convert_fields(given: Mapping[str, Any], kind: Any, place: str, root: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    for key in given:
        if key not in names:
            raise RegraftError(describe_unknown_key(str(key), place, root))
    return {
        key: convert(part, hints[key], f"{place}.{key}" if place else key, root)
        for key, part in given.items()
    }


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert_union(value: Any, kinds: tuple[Any, ...], place: str, root: type) -> Any:
    """The value as the first of the kinds that takes it; else the first kind's refusal."""
    if value is None and type(None) in kinds:
        return None
    # Text is text wherever it may be; a number written as text comes next.
    kinds = tuple(
        sorted((one for one in kinds if one is not type(None)), key=lambda k: k is not str)
    )
    refusals = []
    for kind in kinds:
        try:
            return convert(value, kind, place, root)
        except RegraftError as error:
            refusals.append(error)
    # Of a mapping the refusal says which key is wrong, so the kind that takes mappings counts.
    raise refusals[-1 if isinstance(value, Mapping) else 0]


def _convert_scalar(value: Any, kind: Any, place: str) -> Any:
    if kind is str:
        # YAML reads `keep: 0` as a number, which means layer 0 here.
        value = str(value) if type(value) is int else value
    else:
        value = _parse_scalar(value, place)
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                pass  # refused below
    if type(value) is not kind:
        raise _wrong_value(value, f"give {KIND_NAMES[kind]}", place)
    return value


def _parse_text(value: Any, place: str) -> Any:
    """What a text stands for in YAML; any other value as it is."""
    return parse_yaml(value, f"'{place}'") if isinstance(value, str) else value


def _parse_scalar(value: Any, place: str) -> Any:
    """The number, boolean or null that a text stands for in YAML; any other value as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        parsed = parse_yaml(value, f"'{place}'")
    except RegraftError:
        return value  # text such as "a: b: c" is no YAML
    return value if isinstance(parsed, (str, list, dict)) else parsed


def _parse_block(value: Any, place: str) -> Mapping[str, Any]:
    parsed = _parse_text(value, place)
    if not isinstance(parsed, Mapping):
        advice = "give keys with values, such as 'remix: {keep: none}'"
        raise _wrong_value(value, advice, place)
    return parsed


def _wrong_value(value: Any, advice: str, place: str) -> RegraftError:
    what = f"'{place}' is" if place else "it holds"
    return RegraftError(f"{what} {value!r:.60}: {advice}")


def describe_unknown_key(key: str, inside: str, schema: type) -> str:
    """The line for a key that the schema does not have.

    Args:
        key: as it was written, perhaps dotted.
        inside: dotted keys of the block that it stands in, empty at the top.
        schema: has the keys that it is compared with.
    """
    parts, known = key.split("."), list(schema_keys(schema))
    near = [
        *difflib.get_close_matches(parts[0], known, n=2),
        *difflib.get_close_matches(parts[-1], known, n=2),
    ]
    matches = [name for name in dict.fromkeys(near) if name not in parts]
    remedy = f"did you mean {' or '.join(matches)}?" if matches else "remove it"
    where = f" in '{inside}'" if inside else ""
    return f"unknown key '{key:.60}'{where}; {remedy}"


def schema_keys(schema: type) -> Iterator[str]:
    """Every key of a schema, those of nested dataclasses too."""
    for name, hint in typing.get_type_hints(schema).items():
        yield name
        for part in (hint, *typing.get_args(hint)):  # list[Stage], Lit | None
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from schema_keys(part)
