"""The recipe of an experiment: one strict schema for Python, YAML and flags.

Importing it imports no PyTorch, so that a wrong recipe is reported at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.text import Text
from ..errors import RegraftError
from ..io.typed import build_dataclass
from ..io.yaml_loader import parse_yaml, read_yaml
from ..linearize.method import expand_method
from ..mixers.remix_options import RemixOptions
from ..train.stage import Stage


@dataclass(frozen=True)
class Measurements:
    """What is measured of teacher, baselines and model.

    Attributes:
        windows: of held-out text, for perplexity and KL.
        length: tokens of a window.
        tasks: benchmark tasks and kinds of recall.
        task_data: folder with the tasks' files.
        limit: questions of each task and contexts of each recall; None: all, and 32.
        recall: context lengths of recall, in tokens.
        bench: context lengths at which speed and memory are measured, in tokens.
        bench_steps: decoding steps behind each speed.
        prompts: teacher and student continue each of them in the report.
        chat: put the prompts into the tokenizer's chat template.
        sample_tokens: tokens of a continuation.
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
    """A whole experiment: linearize a source, calibrate, train, measure, report.

    A file may have `method` and `tokens` (with `length` and `batch` of a step) in place of remix,
    calibration and stages.

    Attributes:
        source: model directory or GGUF file.
        train: texts to train on.
        heldout: text to measure on. None: the held-out topics of Python's documentation.
        remix: what is replaced by what.
        calibration: tokens for the closed-form start, 0 to leave it out.
        stages: of the training, in order.
        measure: what is measured.
        minutes: time for the whole run, restarts included. The last stage then gets the tokens that
            fit, at most its own number. None: no limit.
        seed: of the order of the data.
    """

    source: str
    train: list[Text]
    heldout: str | None = None
    remix: RemixOptions = field(default_factory=RemixOptions)
    calibration: int = 8192
    stages: list[Stage] = field(default_factory=list)
    measure: Measurements = field(default_factory=Measurements)
    minutes: float | None = None
    seed: int = 0


def load(recipe: str, overrides: Mapping[str, str]) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a YAML file, or `file.py:function` with a function that returns a Recipe.
        overrides: values by dotted key, such as `stages.0.tokens` -> `4096`, in YAML.

    RegraftError for a missing file, an unknown key (near matches are named) or a value of the wrong
    type.
    """
    fields = from_python(recipe) if ".py:" in recipe else from_yaml(Path(recipe))

    # Keys without a dot first: `method` and `tokens` make the stages that a later
    # `stages.0.tokens` changes.
    for key in sorted(overrides, key=lambda key: "." in key):
        if "." in key:
            fields = expand_method(fields)
        override(fields, key, parse_yaml(overrides[key], f"override '{key}'"))
    return build(expand_method(fields), recipe)


def from_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RegraftError when there is none."""
    if not path.exists():
        raise RegraftError(f"no recipe at '{path}': give a YAML file or file.py:function")
    fields = read_yaml(path, f"recipe '{path}'")
    if not isinstance(fields, dict):
        raise RegraftError(
            f"recipe '{path}' holds {type(fields).__name__}, not keys with values: see README, "
            "Recipes"
        )
    return fields


def from_python(reference: str) -> dict[str, Any]:
    """The Recipe that a function returns, as a mapping.

    Args:
        reference: `file.py:function`. The file is run.

    RegraftError when the file or function is missing, or returns something else.
    """
    file, _, name = reference.rpartition(":")
    spec = None
    if Path(file).is_file():
        spec = importlib.util.spec_from_file_location("regraft_recipe", file)
    if spec is None or spec.loader is None:
        raise RegraftError(f"no recipe file '{file}' (from '{reference}'): give file.py:function")

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, name)() if hasattr(module, name) else None
    if not isinstance(recipe, Recipe):
        raise RegraftError(
            f"'{name}' of '{file}' gave {type(recipe).__name__}: it must be a function that "
            "returns a Recipe"
        )
    return dataclasses.asdict(recipe)


def override(fields: dict[str, Any], key: str, value: Any) -> None:
    """Set one value of a recipe in place.

    Args:
        fields: the recipe.
        key: dotted; numbers index lists. Blocks that are missing are made.
        value: what is set.

    RegraftError for a position that a list does not have, or a key below a plain value.
    """
    *path, last = key.split(".")
    target: Any = fields
    for word in path:
        if isinstance(target, list):
            target = target[parse_index(word, target, key)]
        elif isinstance(target, dict):
            target = target.setdefault(word, {})

    if isinstance(target, list):
        target[parse_index(last, target, key)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RegraftError(
            f"override '{key}' goes into {target!r}, which has no parts: override the whole value"
        )


def parse_index(word: str, target: list[Any], key: str) -> int:
    """A position in a list; RegraftError when `word` is none.

    Args:
        word: the part of the key.
        target: the list.
        key: the whole key, for the error.
    """
    if not word.isdecimal() or int(word) >= len(target):
        raise RegraftError(
            f"override '{key}': '{word}' is no position in a list of {len(target)}: count from 0"
        )
    return int(word)


def build(fields: Mapping[str, Any], origin: str = "recipe", schema: type = Recipe) -> Any:
    """Build a recipe from a mapping.

    Args:
        fields: the mapping.
        origin: where it is from, for the error.
        schema: the dataclass to build.

    RegraftError when the mapping does not fit the schema.
    """
    try:
        return build_dataclass(schema, fields)
    except RegraftError as error:
        raise RegraftError(f"recipe '{origin}': {error}") from error


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back, with every default written out."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
