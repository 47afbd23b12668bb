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
from ..core.stock_config import read_stock_config
from ..errors import RegraftError

# Rotary types whose old frequencies return when every m-th pair of a head m times as wide is used.
EVERY_MTH_PAIR = ("default", "linear", "llama3", "proportional")
# Types whose old frequencies return under theta ** (new / old).
THETA_POWER = (*EVERY_MTH_PAIR, "yarn", "longrope", "su")
# Key in the defaults of families that can turn a part of a head only: {config key: the part that is
# meant when the key is missing}.
SHARE = "_rotary_share"
BY_LAYER = "layer_rope_theta"  # key of a theta for each layer; 0: that layer has no positions
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

    # Models with local and global layers have several sets of rotary parameters, each with a theta
    # of its own.
    full = anatomy.fill_defaults(config)
    ropes = [rope for rope in _rope_parameter_sets(full) if rope]
    proportional = any(rotary_type(rope) == "proportional" for rope in ropes)
    turning = _turning_coordinates(full, ropes, old)
    if len(turning) > 1:
        raise RegraftError(
            f"layers turn different parts of a head ({sorted(turning)}): keep --head-dim {old}"
        )

    # Partial rotary: the turning coordinates stay, new ones join those that stand still (L6).
    if turning != {old} or (full.get(SHARE) and not proportional):
        return _keep_rotary_dim(full, turning.pop(), new), pad(old, new)
    return _widen_turning(anatomy, config, ropes, old, new)


def _widen_turning(
    anatomy: Anatomy, config: Mapping[str, Any], ropes: list[dict[str, Any]], old: int, new: int
) -> tuple[dict[str, Any], Expansion]:
    """(config keys, expansion) where all coordinates of a head turn."""
    if new % 2:
        raise RegraftError(
            f"rotary positions need an even --head-dim, got {new}: use {new - 1} or {new + 1}"
        )

    # m * old coordinates hold the old frequencies bit for bit at every m-th pair; other sizes need
    # another theta, exact in real numbers only (L6).
    by_pairs = new % old == 0 and all(rotary_type(rope) in EVERY_MTH_PAIR for rope in ropes)
    keys: dict[str, Any] = {}
    proportional = any(rotary_type(rope) == "proportional" for rope in ropes)
    if proportional or not by_pairs:
        keys = _scale_thetas(anatomy, config, old, new, 1.0 if by_pairs else new / old)

    # Coordinate i turns with coordinate i + half of its head, or with its neighbour.
    pairs = torch.arange(old // 2) * (new // old if by_pairs else 1)
    if anatomy.rotary_pairs:
        return keys, place(old, new, torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten())
    return keys, place(old, new, torch.cat([pairs, pairs + new // 2]))


def _turning_coordinates(
    config: Mapping[str, Any], ropes: list[dict[str, Any]], dim: int
) -> set[int]:
    """How many coordinates of a head turn; several numbers when kinds of layers differ."""
    # Type "proportional" counts as all of them: it stands pairs still by giving them frequency 0.
    if any(rotary_type(rope) == "proportional" for rope in ropes):
        return {dim}
    return {_rotary_dim(rope, config, dim) for rope in ropes} or {_rotary_dim({}, config, dim)}


def rotary_type(rope: Mapping[str, Any]) -> str:
    """The rotary type of one set of parameters."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_parameter_sets(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sets of rotary parameters: one, or one per kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return list(rope.values()) if _is_nested(rope) else [dict(rope)]


def _is_nested(rope: Mapping[str, Any]) -> bool:
    """Whether rotary parameters hold a set for each kind of layer."""
    return bool(rope) and all(isinstance(value, dict) for value in rope.values())


def _rotary_dim(rope: Mapping[str, Any], config: Mapping[str, Any], dim: int) -> int:
    """How many of a head's `dim` coordinates turn under one set of rotary parameters."""
    given = [
        rope.get("partial_rotary_factor"),
        config.get("partial_rotary_factor"),
        config.get("rotary_pct"),
        *config.get(SHARE, {}).values(),
    ]
    shares = [share for share in given if share is not None]
    return int(dim * shares[0]) if shares else dim


def compute_partial_factor(turning: int, dim: int) -> float:
    """The share of `dim` coordinates that a class rounds down to `turning` ones."""
    # turning / dim times dim may round to less than `turning`.
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
    theta: int | float, power: float, instead: str = "use a smaller --head-dim, or a whole multiple"
) -> float:
    """theta ** power; RegraftError when float32, which frequencies are computed in, cannot hold it.

    Args:
        theta: the base of the frequencies, theta ** (-2i / dim).
        power: the exponent.
        instead: what to do instead, for the message.
    """
    if power * math.log(theta) > math.log(LARGEST):
        raise RegraftError(
            f"rotary theta {theta:g} would have to be {theta:g} ** {power:g}, beyond float32, to"
            f" keep its frequencies: {instead}"
        )
    return float(theta) ** power


def _scale_thetas(
    anatomy: Anatomy, config: Mapping[str, Any], old: int, new: int, power: float
) -> dict[str, Any]:
    """theta ** power wherever the config has a theta, and where the class has one of its own."""
    keys: dict[str, Any] = {}
    for key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base"):
        if config.get(key) is not None:
            keys[key] = compute_theta_power(config[key], power)
    if config.get(BY_LAYER):
        keys[BY_LAYER] = [theta and compute_theta_power(theta, power) for theta in config[BY_LAYER]]

    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        if _is_nested(rope):
            keys[key] = {
                kind: _scale_parameter_set(one, old, new, power) for kind, one in rope.items()
            }
        else:
            keys[key] = _scale_parameter_set(rope, old, new, power)
        if rotary_type(keys[key]) == "proportional":
            keys["partial_rotary_factor"] = keys[key]["partial_rotary_factor"]

    # A theta that the config lacks is the class's default: one, or one for each kind of layer.
    rope = read_stock_config(config, anatomy).rope_parameters
    if _is_nested(rope):
        keys["rope_parameters"] = {
            kind: _scale_parameter_set(one, old, new, power) for kind, one in rope.items()
        }
    elif not any("rope_theta" in one for one in (keys, *_rope_parameter_sets(config))):
        keys["rope_theta"] = compute_theta_power(rope["rope_theta"], power)
    return keys


def _scale_parameter_set(
    rope: Mapping[str, Any], old: int, new: int, power: float
) -> dict[str, Any]:
    """One set of rotary parameters with theta ** power."""
    if rotary_type(rope) not in THETA_POWER:
        raise RegraftError(
            f"rotary type '{rotary_type(rope)}' sets frequencies by the length it sees, so wider"
            " heads cannot keep them: grow heads, hidden, ffn or layers instead"
        )

    changed = dict(rope)
    if "rope_theta" in rope:
        changed["rope_theta"] = compute_theta_power(rope["rope_theta"], power)
    if rotary_type(rope) == "proportional":
        # As many pairs turn as before; with every m-th pair in use, the ones between turn as well.
        pairs = int(rope.get("partial_rotary_factor", 1.0) * old // 2)
        pairs *= new // old if power == 1 else 1
        changed["partial_rotary_factor"] = compute_partial_factor(2 * pairs, new)

    # Longrope divides every frequency by a number of its own: new pairs get 1.
    for key in ("short_factor", "long_factor"):
        if key in rope:
            changed[key] = [*rope[key], *[1.0] * (new // 2 - len(rope[key]))]
    return changed
