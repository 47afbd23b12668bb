"""Damage to files: cut, flipped bits, values of other types, nests, giants, keys too many or few."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 7, 1.5, -0.5, 10**6, 10**12, 2**63, 10**40, 1e300,
    float("nan"), float("inf"), "", "x", "7", "../../../etc/passwd", "/dev/zero", "\x00", "\ud800",
    "{}", [], [None], [[]], ["x"], [1, 2], [{}], {}, {"a": 1}, {"": None}, {"name": []},
]  # fmt: skip
# Put into the text of a file in place of a value: what json.dumps cannot write.
RAW = [
    "9" * 100_000,
    "1e999",
    "-" + "9" * 5000,
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 500 + "]" * 500,
]
MARK = "5eef00d5eef00d"


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a JSON value, itself included."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:3])
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from paths(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path; `...` removes it."""
    if not path:
        return new
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


def dump(value: Any) -> str:
    return json.dumps(value, default=str)


@st.composite
def damaged_json(draw: Any, value: Any) -> str:
    """The text of a JSON value with one thing wrong in it."""
    path = draw(st.sampled_from(list(paths(value))))
    kind = draw(
        st.sampled_from(["type", "type", "type", "raw", "missing", "extra", "version", "twice"])
    )
    if kind == "type":
        return dump(changed(value, path, draw(st.sampled_from(WRONG))))
    if kind == "raw":
        return dump(changed(value, path, MARK)).replace(f'"{MARK}"', draw(st.sampled_from(RAW)))
    if kind == "missing" and path:
        return dump(changed(value, path, ...))
    if kind == "version" and isinstance(value, dict):
        return dump(value | {"version": draw(st.sampled_from([2, 99, "2", None, 10**30]))})
    if kind == "twice" and isinstance(value, dict):
        return dump(value)[:-1] + ', "steps": 1, "steps": 2}'
    return dump(changed(value, (*path, "of tomorrow"), 1)) if at(value, path) == {} else dump(value)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def damaged_bytes(draw: Any, data: bytes) -> bytes | None:
    """A file that is gone, cut, empty, with flipped bits, or with other bytes in it."""
    kind = draw(st.sampled_from(["gone", "cut", "flipped", "flipped", "zeros", "noise", "twice"]))
    if kind == "gone":
        return None
    if kind == "cut":
        return data[: draw(st.integers(0, max(0, len(data) - 1)))]
    if kind == "flipped":
        flipped = bytearray(data or b"x")
        for bit in draw(st.lists(st.integers(0, 8 * len(flipped) - 1), min_size=1, max_size=3)):
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)
    if kind == "zeros":
        return bytes(len(data))
    return draw(st.binary(max_size=100)) if kind == "noise" else data + data


@st.composite
def damaged(draw: Any, data: bytes, name: str) -> bytes | None:
    """Damage that suits the format that a file's name says."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(data))
    if name.endswith(".json"):
        return draw(damaged_json(json.loads(data))).encode("utf-8", "surrogatepass")
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines()
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = draw(damaged_json(json.loads(lines[number])))
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = draw(damaged_json(json.loads(data[8 : 8 + length]))).encode(
            "utf-8", "surrogatepass"
        )
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return draw(damaged_bytes(data))
