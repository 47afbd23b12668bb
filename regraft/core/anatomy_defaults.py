"""Defaults of `Anatomy`'s functions: what holds unless a family's table says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .part import Config


def softmax_scale(config: Config, dim: int, layer: int) -> float:
    """One over the root of the head size (arXiv 1706.03762, section 3.2.1)."""
    return dim**-0.5


def always(config: Config, layer: int) -> bool:
    """It holds for every layer."""
    return True


def no_prefix(config: Config) -> str:
    """Names have no prefix that depends on the config."""
    return ""


def read_clip(config: Config) -> float | None:
    """The limit of queries, keys and values under the key that most classes have for it."""
    return config.get("clip_qkv")


def no_bridge(config: Config) -> str | None:
    """No other family holds shapes that this one cannot."""
    return None


def no_keys(config: Config) -> dict[str, Any]:
    """No further config keys change with the sizes."""
    return {}


def label_count(config: Config) -> int:
    """Number of labels of a classifier; 2 when the config does not say."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)


def older_rope_keys(config: Config) -> dict[str, Any]:
    """`rope_parameters` under the keys that transformers used before version 5.

    They are written beside `rope_parameters`, so that readers that do not know it load the config
    too.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}

    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rope
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return keys


def read_aliases(aliases: Mapping[str, str]) -> Callable[[Config], dict[str, Any]]:
    """A function for `Anatomy.rewrite`: keys under other names that the class takes too.

    Args:
        aliases: the other name -> the name in the table.
    """

    def rewrite(config: Config) -> dict[str, Any]:
        found = [alias for alias in aliases if alias in config]
        # Null is what no class knows by that name: it is left out.
        renamed = {aliases[alias]: config[alias] for alias in found if config[alias] is not None}
        return renamed | dict.fromkeys(found)

    return rewrite


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with the first of the prefixes that it has replaced.

    Args:
        name: to change.
        prefixes: prefix -> what stands in its place.
    """
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name[len(found) :]


def module_name(family: str) -> str:
    """The name of a family's file, without its ending."""
    return family.replace("-", "_")
