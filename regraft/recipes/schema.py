"""The recipe of an experiment: one strict schema for Python, YAML and flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import re
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from ..data.corpus import Text
from ..errors import RegraftError
from ..linearize.method import expand_method
from ..mixers.remix import Remix
from ..train.stage import Stage


@dataclass(frozen=True)
class Measurements:
    """What is measured: evaluation windows and their length, context lengths of the bench, prompts of the samples.

    `tasks`: benchmarks, whose files lie in `task_data`, and kinds of recall, at the context lengths `recall`; `limit`:
    questions of each and contexts of each recall (None: all, and 32).
    """

    windows: int = 16
    length: int = 1024
    tasks: list[str] = field(default_factory=list)
    task_data: str | None = None
    limit: int | None = None
    recall: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    bench: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    bench_steps: int = 32
    prompts: list[str] = field(default_factory=list)
    chat: bool = False
    sample_tokens: int = 96


@dataclass(frozen=True)
class Recipe:
    """A whole experiment: linearize `source`, calibrate, train in `stages`, measure, report.

    `train`: texts to train on; `heldout`: text to measure on (None: the held-out topics of Python's documentation).
    `calibration`: tokens for the closed-form start, 0 to leave it out. `minutes`: budget of the whole run, restarts
    included; the last stage then gets the tokens that fit, at most its own number. `seed`: of the data's order.
    A file may say `method` and `tokens` (with `length` and `batch` of a step) instead of remix, calibration and stages.
    """

    source: str
    train: list[Text]
    heldout: str | None = None
    remix: Remix = field(default_factory=Remix)
    calibration: int = 8192
    stages: list[Stage] = field(default_factory=list)
    measure: Measurements = field(default_factory=Measurements)
    minutes: float | None = None
    seed: int = 0


def load(recipe: str, overrides: Mapping[str, str]) -> Recipe:
    """A recipe from a YAML file or `file.py:function`, with dotted overrides such as `stages.0.tokens` -> `4096`.

    RegraftError on a missing file, an unknown key (near matches are named) or a value of the wrong type.
    """
    fields = from_python(recipe) if ".py:" in recipe else from_yaml(Path(recipe))
    for key in sorted(
        overrides, key=lambda key: "." in key
    ):  # a method and its tokens before parts of what they mean
        fields = expand_method(fields) if "." in key else fields
        override(fields, key, yaml.safe_load(overrides[key]))
    return build(expand_method(fields), recipe)


def from_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise RegraftError(f"no recipe at '{path}': give a YAML file or file.py:function")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegraftError(f"recipe '{path}' is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RegraftError(
            f"recipe '{path}' holds {type(fields).__name__}, not keys with values: see README, Recipes"
        )
    return fields


def from_python(place: str) -> dict[str, Any]:
    """The Recipe that a function returns, as a mapping."""
    file, _, name = place.rpartition(":")
    spec = (
        importlib.util.spec_from_file_location("regraft_recipe", file)
        if Path(file).is_file()
        else None
    )
    if spec is None or spec.loader is None:
        raise RegraftError(f"no recipe file '{file}' (from '{place}'): give file.py:function")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, name)() if hasattr(module, name) else None
    if not isinstance(made, Recipe):
        raise RegraftError(
            f"'{name}' of '{file}' gave {type(made).__name__}: it must be a function that returns a Recipe"
        )
    return dataclasses.asdict(made)


def override(fields: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; numbers index lists."""
    *path, last = key.split(".")
    place: Any = fields
    for word in path:
        if isinstance(place, list):
            place = place[parse_index(word, place, key)]
        elif isinstance(place, dict):
            place = place.setdefault(word, {})
    if isinstance(place, list):
        place[parse_index(last, place, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RegraftError(
            f"override '{key}' goes into {place!r}, which has no parts: override the whole value"
        )


def parse_index(word: str, place: list[Any], key: str) -> int:
    """A list position."""
    if not word.isdigit() or int(word) >= len(place):
        raise RegraftError(
            f"override '{key}': '{word}' is no position in a list of {len(place)}: count from 0"
        )
    return int(word)


def build(fields: Mapping[str, Any], place: str = "recipe", schema: type = Recipe) -> Any:
    """Check a mapping against the schema and make the recipe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(schema)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made = parser.instantiate(parser.parse_object(stringify_numbers(fields, schema)))
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise RegraftError(f"recipe '{place}': {explain_error(str(error), schema)}") from error
    return schema(**made.as_dict() if hasattr(made, "as_dict") else dict(made))


def stringify_numbers(value: Any, kind: Any) -> Any:
    """The value with whole numbers as text where `kind` wants text: YAML reads `keep: 0` as a number."""
    parts = typing.get_args(kind)
    if kind is str and type(value) is int:
        return str(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = typing.get_type_hints(kind)
        return {key: stringify_numbers(part, hints.get(key)) for key, part in value.items()}
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [stringify_numbers(part, parts[0]) for part in value]
    wanted = next((part for part in parts if dataclasses.is_dataclass(part)), None)
    return (
        stringify_numbers(value, wanted)
        if wanted and typing.get_origin(kind) is not dict
        else value
    )


def explain_error(message: str, schema: type = Recipe) -> str:
    """The schema's complaint in one line, with near matches for an unknown key."""
    message = re.sub(r"\s+", " ", message.replace("Parser key ", "")).strip()
    message = re.sub(r"Problem with given class_path '[\w.]*\.(\w+)':", r"in \1:", message)
    unknown = re.search(r"[Oo]ption '([\w.]+)'(?: is not accepted)?", message)
    if unknown and "accept" in message:
        word = unknown[1]
        close = difflib.get_close_matches(word.split(".")[-1], list(schema_keys(schema)), n=2)
        head = difflib.get_close_matches(word.split(".")[0], list(schema_keys(schema)), n=2)
        found = [name for name in dict.fromkeys(head + close) if name not in word.split(".")]
        where = re.search(r"Group '([\w.]+)'|\"(\w+)\":", message)
        inside = f" in '{where[1] or where[2]}'" if where else ""
        return f"unknown key '{word}'{inside}; " + (
            f"did you mean {' or '.join(found)}?" if found else "remove it"
        )
    return message


def schema_keys(schema: type) -> Iterator[str]:
    """Every key of the schema, nested ones too."""
    for name, hint in typing.get_type_hints(schema).items():
        yield name
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from schema_keys(part)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
