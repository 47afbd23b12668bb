"""Rotary positions under wider heads: where old coordinates go, and the config that keeps their frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..anatomy import Anatomy
from ..axes import Expansion, pad, place
from ..errors import RegraftError

MULTIPLE = ("default", "linear", "llama3")  # types whose frequencies at old pairs return when every m-th pair is used
LOWERED = (*MULTIPLE, "yarn", "longrope", "su")  # types that allow theta ** (new / old)


def widened(anatomy: Anatomy, config: Mapping[str, Any], old: int, new: int) -> tuple[dict[str, Any], Expansion]:
    """(config keys, expansion) for queries and keys whose heads grow from `old` to `new`.

    Heads that turn in part keep the turning coordinates and append to the others. Otherwise `new` = m * old keeps theta
    and uses every m-th pair, which leaves the frequencies bit for bit; other sizes take theta ** (new / old), exact in
    real numbers. RegraftError for odd sizes and for types whose frequencies depend on the length seen.
    """
    if not anatomy.rotary or new == old:
        return {}, pad(old, new)
    if new % 2:
        raise RegraftError(f"rotary positions need an even --head-dim, got {new}: use {new - 1} or {new + 1}")
    scopes = [scope for scope in _scopes(config) if scope]
    turning = {_turning(scope, config, old) for scope in scopes} or {old}
    if len(turning) > 1:
        raise RegraftError(f"layers turn different parts of a head ({sorted(turning)}): keep --head-dim {old}")
    keys = _partial(config, turning.pop(), new) if turning != {old} else None
    if keys is not None:
        return keys, pad(old, new)
    whole = new % old == 0 and all(kind(scope) in MULTIPLE for scope in scopes)
    changed = {} if whole else _lowered(config, old, new)
    half, step = old // 2, new // old if whole else 1
    pairs = torch.arange(half) * step
    return changed, place(old, new, torch.cat([pairs, pairs + new // 2]))


def kind(scope: Mapping[str, Any]) -> str:
    """The rotary type of one set of parameters."""
    return str(scope.get("rope_type") or scope.get("type") or "default")


def _scopes(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sets of rotary parameters: one, or one per kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return list(rope.values())
    return [dict(rope)]


def _turning(scope: Mapping[str, Any], config: Mapping[str, Any], dim: int) -> int:
    share = scope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    return int(dim * share)


def _partial(config: Mapping[str, Any], turning: int, new: int) -> dict[str, Any]:
    """The share of a wider head that leaves `turning` coordinates turning."""
    share = turning / new
    while int(new * share) < turning:
        share = math.nextafter(share, 1)
    keys: dict[str, Any] = {key: share for key in ("partial_rotary_factor", "rotary_pct") if key in config}
    if config.get("rope_parameters"):
        keys["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": share}
    return keys


def _lowered(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """theta ** (new / old) wherever theta is said."""
    keys: dict[str, Any] = {}
    power = new / old
    for key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base"):
        if config.get(key) is not None:
            keys[key] = float(config[key]) ** power
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            nested = bool(rope) and all(isinstance(value, dict) for value in rope.values())
            keys[key] = (
                {name: _scope(scope, power, new) for name, scope in rope.items()}
                if nested
                else _scope(rope, power, new)
            )
    if not any(key in keys for key in ("rope_theta", "rope_parameters")):
        keys["rope_theta"] = 10000.0**power
    return keys


def _scope(scope: Mapping[str, Any], power: float, new: int) -> dict[str, Any]:
    if kind(scope) not in LOWERED:
        raise RegraftError(
            f"rotary type '{kind(scope)}' sets frequencies by the length it sees, so wider heads cannot keep them: "
            "grow heads, hidden, ffn or layers instead"
        )
    changed = dict(scope)
    if "rope_theta" in scope:
        changed["rope_theta"] = float(scope["rope_theta"]) ** power
    for key in ("short_factor", "long_factor"):
        if key in scope:
            changed[key] = [*scope[key], *[1.0] * (new // 2 - len(scope[key]))]
    return changed
