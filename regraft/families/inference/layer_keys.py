"""Config keys that name layers by their numbers, when layers move."""

from __future__ import annotations

import re
from typing import Any

from ...core.part import Config
from .layer_settings import move_layer_settings

# Keys that say by numbers which kind of layer stands where, in some classes.
NUMBERED = re.compile(r"\w*(layer_period|layer_offset|layer_indices|layer_ids)")
# Keys that count the layers before the first of another kind.
FIRST_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")


# Factors that follow sizes, see `scale_factors`.
FACTORS = ("scale_depth", "dim_model_base")


def has_numbered_layers(config: Config) -> bool:
    """Whether a config says by numbers which kind of layer stands where."""
    return any(
        NUMBERED.fullmatch(key) or FIRST_LAYERS.fullmatch(key)
        for key, value in config.items()
        if value is not None
    )


def move_layer_keys(config: Config) -> dict[str, Any]:
    """Lists of the numbers of layers, and counts of first layers, where layers move.

    Args:
        config: with `_order`, the layer of the source that each layer comes from, and `_before`,
            the sizes before; nothing changes without an order.
    """
    order = config.get("_order")
    if order is None:
        return {}
    depth = config["_before"]["depth"]
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if _is_count(key, value, depth) and order == sorted(order):
            changed[key] = sum(layer < value for layer in order)
        elif _names_layers(key, value, depth):
            changed[key] = [new for new, old in enumerate(order) if old in value]
    return changed


def scale_factors(config: Config) -> dict[str, Any]:
    """Factors that a class divides by a size, as MiniCPM divides what branches add by the root of
    the number of layers (arXiv 2404.06395, section 3.2) and the head's input by the hidden size.

    Args:
        config: with new sizes, and `_before`, those before.
    """
    before = config["_before"]
    changed: dict[str, Any] = {}
    depth, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if type(config.get("scale_depth")) in (int, float) and depth:
        changed["scale_depth"] = config["scale_depth"] * (depth / before["depth"]) ** 0.5
    if type(config.get("dim_model_base")) in (int, float) and hidden:
        changed["dim_model_base"] = config["dim_model_base"] * hidden / before["hidden"]
        if changed["dim_model_base"] == int(changed["dim_model_base"]):
            changed["dim_model_base"] = int(changed["dim_model_base"])
    return changed


def follow_sizes(config: Config) -> dict[str, Any]:
    """Keys that follow layers and sizes; see `move_layer_keys`, `scale_factors` and
    `move_layer_settings`.
    """
    return move_layer_keys(config) | scale_factors(config) | move_layer_settings(config)


def _is_count(key: str, value: object, depth: int) -> bool:
    return FIRST_LAYERS.fullmatch(key) is not None and type(value) is int and 0 < value <= depth


def _names_layers(key: str, value: object, depth: int) -> bool:
    """Whether a value lists layers by their numbers."""
    return (
        "layer" in key
        and not key.startswith("_")
        and isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(one) is int and 0 <= one < depth for one in value)
        and list(value) == sorted(set(value))
    )
