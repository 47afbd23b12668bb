"""YAML as recipes and flags have it: plain values, bounded in size, depth and aliases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import RegraftError
from .files import check_regular_file

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000  # keys, values and blocks; those behind an alias count each time it is used
MAX_DEPTH = 32
MAX_DIGITS = 100  # of a number

FLOAT, TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
# YAML 1.1 reads 1e-3 as text; 1.2 and JSON read it as a number, and so does this pattern.
FLOAT_PATTERN = re.compile(
    r"""^(?:
    [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)
SCALARS = (str, int, float, bool, type(None))


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, with 1e-3 as a number and bounded numbers."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; one of a million digits would take minutes to convert."""
        return int(super().construct_yaml_int(self._check_digits(node)))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A number with a point or an exponent."""
        return float(super().construct_yaml_float(self._check_digits(node)))

    def _check_digits(self, node: yaml.ScalarNode) -> yaml.ScalarNode:
        if len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} characters, over {MAX_DIGITS}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node


PlainLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (FLOAT, TIMESTAMP)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(FLOAT, FLOAT_PATTERN, list("-+0123456789."))
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor(FLOAT, PlainLoader.construct_yaml_float)


def read_yaml(path: Path, what: str) -> Any:
    """The value in a YAML file.

    Args:
        path: the file.
        what: what it is, for messages: "recipe 'x.yaml'".

    RegraftError when it is no regular file, not YAML, or goes beyond the bounds of `parse_yaml`.
    """
    check_regular_file(path, what)
    with open(path, "rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # A cut in the middle of a character is the bound's doing, which `parse_yaml` reports.
        if len(raw) <= MAX_BYTES:
            raise RegraftError(f"{what} is not YAML ({error}): write it as UTF-8 text") from error
        text = raw.decode("utf-8", "replace")
    return parse_yaml(text, what)


def parse_yaml(text: str, what: str) -> Any:
    """The value that a text in YAML (or JSON) stands for: text, numbers, lists, mappings.

    Args:
        text: the YAML.
        what: what it is, for messages.

    RegraftError when it is not YAML, holds anything else (tags that name objects, dates, bytes), is
    larger than a megabyte, nests deeper than 32 levels, or has more than 50,000 values.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise RegraftError(f"{what} has {size:,} bytes or more, over {MAX_BYTES:,}: shorten it")
    try:
        check_bounds(text, what)
        value = yaml.load(text, PlainLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError) as error:
        message = " ".join(str(error).split())
        raise RegraftError(f"{what} is not YAML: {message}") from error
    check_plain(value, what)
    return value


def check_bounds(text: str, what: str) -> None:
    """RegraftError for a text whose values are too many or too deep, aliases written out.

    Only the parser's events are looked at: nothing is built, so a few lines of nested aliases that
    stand for 10^9 values cost nothing.
    """
    # The open blocks from the outside: [anchor, values inside so far, levels inside so far].
    blocks: list[list[Any]] = [[None, 0, 0]]
    anchors: dict[str, tuple[int, int]] = {}  # anchor -> (values, levels) of what it names

    def add(values: int, levels: int) -> None:
        blocks[-1][1] += values
        blocks[-1][2] = max(blocks[-1][2], levels)
        total = sum(block[1] for block in blocks)
        if total > MAX_VALUES:
            raise RegraftError(
                f"{what} stands for more than {MAX_VALUES:,} values, aliases written out: shorten "
                "it"
            )
        if len(blocks) - 1 + levels > MAX_DEPTH:
            raise RegraftError(f"{what} nests deeper than {MAX_DEPTH} levels: make it flatter")

    for event in yaml.parse(text, PlainLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise RegraftError(
                    f"{what} has the alias '*{event.anchor}' inside or before '&{event.anchor}': "
                    "write its value out"
                )
            add(*anchors[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            add(1, 0)
            if event.anchor:
                anchors[event.anchor] = 1, 0
        elif isinstance(event, yaml.CollectionStartEvent):
            blocks.append([event.anchor, 1, 0])
            add(0, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = blocks.pop()
            if anchor:
                anchors[anchor] = values, levels + 1
            add(values, levels + 1)


def check_plain(value: Any, what: str) -> None:
    """RegraftError unless a value is made of text, numbers, booleans, null, lists and mappings."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, SCALARS):
                raise RegraftError(f"{what} has the key {key!r}: keys are text or numbers")
            check_plain(part, what)
    elif isinstance(value, list):
        for part in value:
            check_plain(part, what)
    elif not isinstance(value, SCALARS):
        raise RegraftError(
            f"{what} holds a {type(value).__name__} ({value!r:.60}): give text, numbers, lists or "
            "mappings"
        )
