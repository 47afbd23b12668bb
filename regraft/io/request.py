"""What a run or a command was asked for, and whether that is what is asked for now."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from .schema import shorten

Identity: TypeAlias = dict[str, str]
"""The parts of an input, such as its files by name, with their hashes; see `io.identity`."""

INPUTS = "inputs"  # the key of a request that holds the identity of each input
SAMPLED = "sampled:"  # how the hash of sampled blocks begins
RECORDED = " as its lineage has it"  # how the name of a hash from lineage.json ends
SHOWN = 12  # characters of a hash in a message


def plain(value: Any) -> Any:
    """A value as JSON gives it back, which has no tuples and no paths."""
    return json.loads(json.dumps(value, default=str))


def find_difference(before: Any, now: Any) -> str | None:
    """What differs between two requests, in words; None when they are the same."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else "another request"
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if key == INPUTS and isinstance(old, dict) and isinstance(new, dict):
            change = find_changed_input(old, new)
            if change or set(old) != set(new):
                return f"another input ({change or f'{list(old)} there, {list(new)} here'})"
        elif old != new:
            return f"another {key.replace('_', ' ')} ({_first_difference(old, new)})"
    return None


def _first_difference(before: Any, now: Any) -> str:
    """The first values that differ inside of two, or the first line of two texts."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        return f"{key}: {_first_difference(before.get(key), now.get(key))}"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(before, now, strict=True)
        return _first_difference(*next(pair for pair in pairs if pair[0] != pair[1]))

    if isinstance(before, str) and isinstance(now, str):
        lines = itertools.zip_longest(before.splitlines(), now.splitlines(), fillvalue="nothing")
        before, now = next((pair for pair in lines if pair[0] != pair[1]), (before, now))
        before, now = before.strip(), now.strip()
    return f"{shorten(before)} there, {shorten(now)} here"


def find_change(before: Any, now: Mapping[str, str]) -> str:
    """The first part in which two identities differ, with both hashes; empty when none does.

    Args:
        before: as it was recorded.
        now: of the input as it is.
    """
    if not isinstance(before, Mapping):
        return f"was recorded as {str(before)[:60]!r}, by another version"
    for part in dict.fromkeys((*before, *now)):
        old, new = before.get(part), now.get(part)
        # A copy may have lost lineage.json, which tells nothing about its weights.
        optional = part.endswith(RECORDED) and None in (old, new)
        if old != new and not optional:
            return f"{part} was {_show(old)}, is {_show(new)}"
    return ""


def find_changed_input(before: Any, now: Mapping[str, Mapping[str, str]]) -> str:
    """The first of several inputs that is not what was recorded, and how; empty when none is.

    Args:
        before: the identity of each input as it was recorded. Inputs without one are new.
        now: the identity of each input.
    """
    if not isinstance(before, Mapping):
        return find_change(before, {})
    for name, identity in now.items():
        if name in before and (change := find_change(before[name], identity)):
            return f"{name}: {change}"
    return ""


def _show(digest: str | None) -> str:
    return "missing" if digest is None else digest.removeprefix(SAMPLED)[:SHOWN]
