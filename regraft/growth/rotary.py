"""Rotary positions under wider heads: where old coordinates go, and the config that keeps their
frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..core.anatomy import Anatomy
from ..core.axes import Expansion, pad, place
from ..errors import RegraftError

MULTIPLE = (
    "default",
    "linear",
    "llama3",
    "proportional",
)  # types whose frequencies at old pairs return when every m-th pair is used
LOWERED = (*MULTIPLE, "yarn", "longrope", "su")  # types that allow theta ** (new / old)
# table key of classes that can turn a part of a head: {config key: what a missing one means}
SHARE = "_rotary_share"
LARGEST = 3e38  # theta is a float32 number where frequencies are computed


def widen_rotary(
    anatomy: Anatomy, config: Mapping[str, Any], old: int, new: int
) -> tuple[dict[str, Any], Expansion]:
    """(config keys, expansion) for queries and keys whose heads grow from `old` to `new`.

    Classes that can turn a part of a head keep the turning coordinates and append to the others.
    Otherwise `new` = m * old keeps theta and uses every m-th pair, which leaves the frequencies bit
    for bit; other sizes take theta ** (new / old), exact in real numbers. RegraftError for odd
    sizes and for types whose frequencies depend on the length seen.
    """
    if not anatomy.rotary or new == old:
        return {}, pad(old, new)

    # Models with local and global layers have several sets of rotary parameters, each its own
    # theta.
    full = anatomy.fill_defaults(config)
    scopes = [scope for scope in _rope_parameter_sets(full) if scope]
    spread = any(rotary_type(scope) == "proportional" for scope in scopes)
    turning = (
        {old}
        if spread
        else {_rotary_dim(scope, full, old) for scope in scopes} or {_rotary_dim({}, full, old)}
    )
    if len(turning) > 1:
        raise RegraftError(
            f"layers turn different parts of a head ({sorted(turning)}): keep --head-dim {old}"
        )

    # Partial rotary: the turning coordinates stay, new ones join those that stand still (L6).
    if turning != {old} or (full.get(SHARE) and not spread):
        return _keep_rotary_dim(full, turning.pop(), new), pad(old, new)
    if new % 2:
        raise RegraftError(
            f"rotary positions need an even --head-dim, got {new}: use {new - 1} or {new + 1}"
        )

    # m * old coordinates hold the old frequencies bit for bit at every m-th pair; other sizes need
    # another theta, exact in real numbers only (L6, R1 and R2).
    whole = new % old == 0 and all(rotary_type(scope) in MULTIPLE for scope in scopes)
    changed = (
        {} if whole and not spread else _scale_thetas(config, old, new, 1.0 if whole else new / old)
    )
    half, step = old // 2, new // old if whole else 1
    pairs = torch.arange(half) * step
    return changed, place(old, new, torch.cat([pairs, pairs + new // 2]))


def rotary_type(scope: Mapping[str, Any]) -> str:
    """The rotary type of one set of parameters."""
    return str(scope.get("rope_type") or scope.get("type") or "default")


def _rope_parameter_sets(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sets of rotary parameters: one, or one per kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return list(rope.values())
    return [dict(rope)]


def _rotary_dim(scope: Mapping[str, Any], config: Mapping[str, Any], dim: int) -> int:
    said = [
        scope.get("partial_rotary_factor"),
        config.get("partial_rotary_factor"),
        config.get("rotary_pct"),
    ]
    shares = [share for share in (*said, *config.get(SHARE, {}).values()) if share is not None]
    return int(dim * shares[0]) if shares else dim


def compute_partial_factor(turning: int, dim: int) -> float:
    """The share of `dim` coordinates that a class rounds down to `turning` ones."""
    share = turning / dim
    while int(dim * share) < turning:
        share = math.nextafter(share, 1)
    return share


def _keep_rotary_dim(config: Mapping[str, Any], turning: int, new: int) -> dict[str, Any]:
    """The share of a wider head that leaves `turning` coordinates turning."""
    share = compute_partial_factor(turning, new)
    names = [key for key in ("partial_rotary_factor", "rotary_pct") if config.get(key) is not None]
    keys: dict[str, Any] = dict.fromkeys([*names, *config.get(SHARE, {})], share)

    # Both spellings of transformers, either of which may hold one set or one a kind of layer.
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key):
            keys[key] = {**config[key], "partial_rotary_factor": share}
    return keys


def compute_theta_power(
    theta: float, power: float, instead: str = "use a smaller --head-dim, or a whole multiple"
) -> float:
    """theta ** power; RegraftError when that is too large for the precision that frequencies are
    computed in.
    """
    if power * math.log(theta) > math.log(LARGEST):
        raise RegraftError(
            f"rotary theta {theta:g} would have to be {theta:g} ** {power:g}, beyond float32, to"
            f" keep its frequencies: {instead}"
        )
    return float(theta) ** power


def _scale_thetas(config: Mapping[str, Any], old: int, new: int, power: float) -> dict[str, Any]:
    """theta ** power wherever theta is said."""
    keys: dict[str, Any] = {}
    for key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base"):
        if config.get(key) is not None:
            keys[key] = compute_theta_power(config[key], power)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            nested = bool(rope) and all(isinstance(value, dict) for value in rope.values())
            keys[key] = (
                {name: _scale_parameter_set(scope, old, new, power) for name, scope in rope.items()}
                if nested
                else _scale_parameter_set(rope, old, new, power)
            )
            if rotary_type(keys[key]) == "proportional":
                keys["partial_rotary_factor"] = keys[key]["partial_rotary_factor"]
    if not any(key in keys for key in ("rope_theta", "rope_parameters")):
        keys["rope_theta"] = compute_theta_power(10000.0, power)
    return keys


def _scale_parameter_set(
    scope: Mapping[str, Any], old: int, new: int, power: float
) -> dict[str, Any]:
    if rotary_type(scope) not in LOWERED:
        raise RegraftError(
            f"rotary type '{rotary_type(scope)}' sets frequencies by the length it sees, so wider"
            " heads cannot keep them: grow heads, hidden, ffn or layers instead"
        )
    changed = dict(scope)
    if "rope_theta" in scope:
        changed["rope_theta"] = compute_theta_power(scope["rope_theta"], power)
    if rotary_type(scope) == "proportional":
        pairs = int(scope.get("partial_rotary_factor", 1.0) * old // 2)
        changed["partial_rotary_factor"] = compute_partial_factor(
            2 * pairs * (new // old if power == 1 else 1), new
        )

    # Longrope divides every frequency by a number of its own: new pairs get 1.
    for key in ("short_factor", "long_factor"):
        if key in scope:
            changed[key] = [*scope[key], *[1.0] * (new // 2 - len(scope[key]))]
    return changed
