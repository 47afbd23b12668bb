"""Config keys that name layers by their numbers, when layers move."""

from __future__ import annotations

import re
from typing import Any

from ...core.part import Config

# Keys that say by numbers which kind of layer stands where, in some classes.
NUMBERED = re.compile(r"\w*(layer_period|layer_offset|layer_indices|layer_ids)")
# Keys that count the layers before the first of another kind.
FIRST_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")


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
