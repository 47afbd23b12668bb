"""What each parameter of a model family is: parts by role, and config keys as products of axes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RegraftError
from .axes import product
from .part import Config, Key, Part, PlacedPart, linear, norm

__all__ = [
    "Anatomy",
    "Config",
    "Key",
    "Part",
    "PlacedPart",
    "list_families",
    "find_anatomy",
    "linear",
    "norm",
    "older_rope_keys",
]


def _default_softmax_scale(config: Config, dim: int, layer: int) -> float:
    return dim**-0.5


def _no_prefix(config: Config) -> str:
    return ""


def _no_bridge(config: Config) -> str | None:
    return None


def _no_keys(config: Config) -> dict[str, Any]:
    return {}


def older_rope_keys(config: Config) -> dict[str, Any]:
    """`rope_parameters` in the keys that readers look for which do not know it."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rope
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return keys


@dataclass(frozen=True)
class Anatomy:
    """A family: every tensor of its checkpoints is claimed by exactly one part, ignored with a
    reason, or refused.

    `sizes` pairs a config key with a product of axes and is solved in both directions; `fixed` sets
    axes the family does not have. `defaults` fills missing config keys (a value, or a function of
    the config). `slot` is the attention module's name. `aliases` maps name prefixes found in files
    to those of the model, `filed` the model's to those that its class writes. `ignored`: pattern ->
    reason. `older(config)`: keys for readers that do not know newer ones. Config keys that begin
    with "_" are computed (by `defaults`) and never written; `finish` turns them back into keys that
    are. `layer_lists`: keys with one entry per layer. `divides`: (key, key) of which the class
    wants the first to be a multiple of the second; `multiples`: axis -> number its size must be a
    multiple of. `embed_scale`: embeddings are multiplied by sqrt(hidden). `scale(config, dim,
    layer)`: the softmax scale. `rotary`: queries and keys turn, in halves. `bridge`: the family
    that can hold what this class cannot, if there is one. `causal`: reads text from left to right;
    `inputs`: tokens or pixels. `activation`: key of the MLP's. `routed`: key of how many experts a
    position is sent to.
    """

    family: str
    parts: dict[str, Part]
    sizes: tuple[tuple[str, str], ...]
    slot: str
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    filed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    eps: str = "rms_norm_eps"
    rotary: bool = True
    scale: Callable[[Config, int, int], float] = _default_softmax_scale
    prefix: Callable[[Config], str] = _no_prefix
    finish: Callable[[Config], dict[str, Any]] = _no_keys
    older: Callable[[Config], dict[str, Any]] = older_rope_keys
    bridge: Callable[[Config], str | None] = _no_bridge
    layer_lists: tuple[str, ...] = ()
    divides: tuple[tuple[str, str], ...] = ()
    multiples: dict[str, int] = field(default_factory=dict)
    embed_scale: bool = False
    causal: bool = True
    inputs: str = "tokens"
    activation: str = "hidden_act"
    routed: str = ""

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The config with the family's defaults for keys that are missing or null."""
        full = dict(config)
        for key, default in self.defaults.items():
            if full.get(key) is None:
                full[key] = default(full) if callable(default) else default
        return full

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of a config. RegraftError when a key is missing, or the equations have no
        whole solution.
        """
        config = self.fill_defaults(config)
        sizes = dict(self.fixed)
        waiting = list(self.sizes)
        while waiting:
            left = [pair for pair in waiting if not self._solve_one(config, *pair, sizes)]
            if len(left) == len(waiting):
                raise RegraftError(
                    f"{self.family} table leaves axes of '{left[0][1]}' open: add a config key to"
                    " `sizes`"
                )
            waiting = left
        return sizes

    def _solve_one(self, config: Config, key: str, text: str, sizes: dict[str, int]) -> bool:
        value, axes = config.get(key), text.split()
        if not isinstance(value, int) or value < 1:
            raise RegraftError(
                f"{self.family} config has {key} = {value!r}: it must be a positive whole number"
            )
        unknown = [axis for axis in axes if axis not in sizes]
        if len(unknown) > 1:
            return False
        known = product(tuple(axis for axis in axes if axis in sizes), sizes)
        if not unknown and known != value:
            raise RegraftError(
                f"{self.family} config has {key} = {value}, but {text} is {known}: make them equal"
            )
        if unknown and value % known:
            raise RegraftError(
                f"{self.family} config has {key} = {value}, not a multiple of {known} (of {text}):"
                " fix it"
            )
        if unknown:
            sizes[unknown[0]] = value // known
        return True

    def config_keys(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The inverse of `solve`: config keys of axis sizes. RegraftError when two equations
        disagree.
        """
        keys: dict[str, tuple[int, str]] = {}
        for key, text in self.sizes:
            value = product(tuple(text.split()), sizes)
            if key in keys and keys[key][0] != value:
                other, axes = keys[key]
                raise RegraftError(
                    f"{self.family} has one key {key} for {axes} ({other}) and {text} ({value}):"
                    " grow them together"
                )
            keys[key] = (value, text)
        return {key: value for key, (value, _) in keys.items()}

    def place(self, config: Config) -> dict[Key, PlacedPart]:
        """Every parameter of a model of this config by (role, layer); layer is None outside the
        stack.
        """
        full, sizes = self.fill_defaults(config), self.solve(config)
        placed: dict[Key, PlacedPart] = {}
        prefix = self.prefix(full)
        for role, part in self.parts.items():
            if part.is_present(full):
                shape = part.axes.shape(sizes, part.stored)
                layers = range(sizes["depth"]) if "{}" in part.name else (None,)
                for layer in layers:
                    for e in range(sizes["expert"]) if "{e}" in part.name else (0,):
                        name = part.name.format(layer, e=e, p=prefix)
                        placed[role.format(e=e), layer] = PlacedPart(name, part, shape)
        return placed

    def untie_embeddings(self, config: Config) -> Config:
        """The config of the same model with a head of its own."""
        return dict(config) | {"tie_word_embeddings": False}

    def host(self, config: Config) -> Anatomy:
        """The family whose norms, positions and constraints count: this one, for stock families."""
        return self

    def host_config(self, config: Config) -> Config:
        """The config of that family."""
        return config

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config of a model with other axis sizes, whose layer i takes per-layer settings from
        layer `order[i]`; `extra` keys are set as well.

        Keys that equal the family's default and were not there stay away. RegraftError when the
        family cannot hold it.
        """
        full, keys = self.fill_defaults(config), self.config_keys(sizes)
        for key in self.layer_lists:
            if order is not None and isinstance(full.get(key), list):
                keys[key] = [full[key][layer] for layer in order]
        keys |= self.finish(full | keys)
        for whole, part in self.divides:
            if keys[whole] % keys[part]:
                raise RegraftError(
                    f"{self.family} wants {whole} to be a multiple of {part}, got {keys[whole]} and"
                    f" {keys[part]}: choose {keys[whole] // keys[part] * keys[part]} or"
                    f" {-(-keys[whole] // keys[part]) * keys[part]}" + self.bridge_hint(config)
                )
        for axis, step in self.multiples.items():
            if sizes[axis] % step:
                near = sizes[axis] // step * step
                raise RegraftError(
                    f"{self.family} needs {axis} to be a multiple of {step}, got {sizes[axis]}: use"
                    f" {near or step} or {near + step}"
                )
        written = {key: value for key, value in keys.items() if not key.startswith("_")}
        bare = self.fill_defaults(
            {
                k: v
                for k, v in (dict(config) | written).items()
                if k in config or k in self.required_keys()
            }
        )
        kept = {
            key: v
            for key, v in written.items()
            if config.get(key) is not None or bare.get(key) != v
        }
        return dict(config) | kept | dict(extra or {})

    def bridge_hint(self, config: Config) -> str:
        """How to get around a constraint of the class, for the end of an error message."""
        name = self.bridge(self.fill_defaults(config))
        return f", or --bridge to write it as {name}" if name else ""

    def required_keys(self) -> set[str]:
        """Config keys that have no default."""
        return {key for key, _ in self.sizes if key not in self.defaults}

    def canonical_name(self, name: str) -> str:
        """The model's name of a tensor found in a file."""
        return _replace_prefix(name, self.aliases)

    def name_in_file(self, name: str) -> str:
        """The name under which the family's class writes a parameter."""
        return _replace_prefix(name, self.filed)

    def reason_to_drop(self, name: str, config: Config) -> str | None:
        """Why a tensor of a file is not a parameter of the model, or None."""
        for pattern, reason in self.ignored.items():
            if re.fullmatch(pattern, name):
                return reason
        head = self.parts.get("head.weight")
        tied = self.fill_defaults(config).get("tie_word_embeddings")
        return (
            "tied: the config shares it with the embedding"
            if head and tied and name == head.name
            else None
        )

    def attention(self, config: Config, layer: int) -> dict[str, Any]:
        """A layer's attention: the arguments of `mixers.base.Attention`."""
        full, sizes = self.fill_defaults(config), self.solve(config)
        roles = {role for role, part in self.parts.items() if part.is_present(full)}
        roles |= {
            f"{name}.{role.rpartition('.')[2]}" for role in roles for name in self.parts[role].fused
        }
        return {
            "hidden": sizes["hidden"],
            "kv": sizes["kv"],
            "group": sizes["group"],
            "dim": sizes["dim"],
            "scale": self.scale(full, sizes["dim"], layer),
            "qkv_bias": "attn.q.bias" in roles,
            "o_bias": "attn.o.bias" in roles,
            "qk_norm": float(full[self.eps]) if "attn.q_norm.weight" in roles else None,
            "rotary": self.rotary,
        }

    def write_extras(self, directory: str, config: Config) -> None:
        """Write what a saved model of this family needs beside config and weights: nothing for
        stock families.
        """


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, replacement in prefixes.items():
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def list_families() -> list[str]:
    """The model types that have a file in regraft/families."""
    package = importlib.import_module("regraft.families")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_anatomy(config: Config) -> Anatomy:
    """The anatomy of a config's `model_type`; RegraftError names the file to write when there is
    none.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in list_families():
        known = ", ".join(name for name in list_families() if name != "regraft")
        raise RegraftError(
            f"unknown family {family!r}: write regraft/families/{family}.py (known: {known})"
        )
    anatomy: Anatomy = importlib.import_module(f"regraft.families.{family}").anatomy
    return anatomy
