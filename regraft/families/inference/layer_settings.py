"""Settings of single layers, by the layer's number, when layers move."""

from __future__ import annotations

from typing import Any

from ...core.part import Config


def renumber_settings(settings: Config, order: list[int]) -> dict[Any, Any]:
    """Settings by the number of a layer, for layers in another order.

    Args:
        settings: the number of a layer, or its digits -> what holds for it alone.
        order: for each layer the old one that it takes its settings from.
    """
    by_layer = {int(layer): one for layer, one in settings.items()}
    return {new: by_layer[old] for new, old in enumerate(order) if old in by_layer}


def holds_settings(value: object) -> bool:
    """Whether the value of a config key is a mapping by the numbers of layers."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(str(layer).isdigit() and isinstance(one, dict) for layer, one in value.items())
    )


def move_layer_settings(config: Config) -> dict[str, Any]:
    """The settings of single layers where layers move, for `Anatomy.finish`.

    Args:
        config: with `_order`, the layer of the source that each layer comes from; nothing changes
            without.
    """
    order = config.get("_order")
    if order is None:
        return {}
    found = {key: value for key, value in config.items() if holds_settings(value)}
    return {key: renumber_settings(value, order) for key, value in found.items()}
