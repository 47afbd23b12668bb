"""An inferred table as plain data, and the Anatomy that it is for one config.

Sizes that no named axis has stand in signatures as names in angle brackets. `build_anatomy` puts
the number in their place that their law gives for the config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, cast

from ...core.anatomy import Anatomy
from ...core.anatomy_defaults import always, softmax_scale
from ...core.part import Config, Part
from ...core.stock_config import config_class, silence_transformers
from ...errors import RegraftError
from .layer_keys import FACTORS, follow_sizes
from .shapes import Law, evaluate_law, list_stored, parse_name
from .tiny_config import find_key

NUMBER = re.compile(r"<(\d+)>")


@dataclass(frozen=True)
class Row:
    """One part of an inferred table; fields as of `core.part.Part`."""

    role: str
    name: str
    signature: str
    stored: str = "out in"
    fused: tuple[str, ...] = ()
    by_head: bool = False
    unless: str | None = None
    reads: str = "normed"
    writes: str = "stream"
    norm: bool = False
    centered: bool = False
    at: Any = "each"
    # Whether some layers lack it.
    in_some_layers: bool = False
    # Where layers differ in its shape: the place of its own, and the laws of all.
    shapes: tuple[Any, ...] = ()


@dataclass(frozen=True)
class InferredTable:
    """What was inferred of a model type; fields as of `core.anatomy.Anatomy`."""

    family: str
    # Name of the class of transformers.
    kind: str
    rows: tuple[Row, ...]
    # Laws of the numbers in signatures, as (key, exponent) pairs and coefficient.
    numbers: tuple[tuple[tuple[Any, float], ...], ...]
    sizes: tuple[tuple[str, str], ...]
    fixed: dict[str, int]
    slot: str
    eps: str
    activation: str
    rotary: bool
    embed_scale: bool
    causal: bool
    rotary_pairs: bool = False
    rotary_tables: str = "halves"
    # Config key of a list with an entry for each layer, and the entries of layers that rotate.
    # None: all do; without a key none does.
    rotates: tuple[str, tuple[Any, ...]] | None = None
    norms_rotated: bool = False
    # The norms' epsilon where the class fixes it, and `eps` is a derived key.
    fixed_eps: float | None = None
    # Derived config keys, which no file has -> their laws over stated ones.
    derived: dict[str, tuple[tuple[Any, float], ...]] = field(default_factory=dict)
    # The MLP's width over that of the stream, where the class fixes it; 0: it has a key.
    ffn_ratio: int = 0
    # Config key of the softmax scale and its exponent; None: one over the root of the head size.
    scale: tuple[str, float] | None = None
    # Attribute of attention modules that holds it, where the class makes it of several keys.
    scale_name: str = ""
    softcap: str | None = None
    # Laws of the axes of latent attention's heads; empty without.
    latent: dict[str, tuple[tuple[Any, float], ...]] = field(default_factory=dict)
    # Epsilon of its norms where the class fixes it; None: that of the others.
    latent_eps: float | None = None
    # Config key of a factor on keys, which scores have too; empty: there is none.
    key_factor: str = ""
    # Law of the channels of layers with a state over hidden; empty where they have a key.
    inner: tuple[tuple[Any, float], ...] = ()
    routed: str = ""
    divides: tuple[tuple[str, str], ...] = ()
    multiples: dict[str, int] = field(default_factory=dict)
    # Keys that the config may lack or have null -> the product of keys and numbers that the class
    # takes.
    filled: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    # Axes that do not grow, or "attention" that is not linearized -> why.
    closed: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> InferredTable:
        """The inverse of `to_json`."""
        fields = {key: _to_tuple(item) for key, item in value.items()}
        rows = tuple(Row(**{k: _to_tuple(v) for k, v in row.items()}) for row in value["rows"])
        return cls(**{**fields, "rows": rows})


def _to_tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tuple(one) for key, one in value.items()}
    return tuple(map(_to_tuple, value)) if isinstance(value, list | tuple) else value


def pack_law(law: Law) -> tuple[tuple[Any, float], ...]:
    """A law as plain data."""
    return tuple(law.items())


def build_anatomy(table: InferredTable, config: Config) -> Anatomy:
    """The table for a config, with its numbers in the signatures.

    RegraftError when a number does not follow.
    """
    full = read_full(table, config)
    numbers = [evaluate_law(dict(law), full) for law in table.numbers]
    keys = {key for key, _ in table.sizes} | {*FACTORS}
    stated = {key: full[key] for key in keys if full.get(key) is not None}
    others = [table.eps, table.activation, table.routed, table.key_factor]
    others += [table.scale[0]] if table.scale else []
    defaults = {key: full[key] for key in others if key and full.get(key) is not None}
    defaults |= {key: _DerivedSize(law) for key, law in table.derived.items()}
    if table.fixed_eps is not None:
        defaults[table.eps] = table.fixed_eps

    sizes = table.sizes
    ratio = evaluate_law(dict(table.inner), full) if table.inner else 0
    if ratio:
        hidden = next(key for key, axes in sizes if axes == "hidden")
        sizes = (*sizes, ("_inner", "inner"))
        defaults["_inner"] = partial(_multiply, hidden, ratio)

    return Anatomy(
        family=table.family,
        parts={row.role: _build_part(table, row, numbers) for row in table.rows},
        sizes=sizes,
        slot=table.slot,
        defaults={"tie_word_embeddings": full.get("tie_word_embeddings", True), **defaults},
        fixed=table.fixed
        | {axis: evaluate_law(dict(law), full) for axis, law in table.latent.items()},
        eps=table.eps,
        latent_eps=table.latent_eps,
        rotary=table.rotary and table.rotates != ("", ()),
        rotary_pairs=table.rotary_pairs,
        rotary_tables=cast(Any, table.rotary_tables),
        rotates=_LayerRotates(table) if table.rotates else always,
        norms_rotated=table.norms_rotated,
        ffn_ratio=table.ffn_ratio,
        scale=_ClassScale(table)
        if table.scale_name
        else _build_scale(table.scale, table.key_factor),
        softcap=(table.softcap, None) if table.softcap else None,
        rewrite=lambda other: _state_sizes(other, stated),
        finish=follow_sizes,
        divides=table.divides,
        inner_ratio=ratio,
        multiples=table.multiples,
        embed_scale=table.embed_scale,
        causal=table.causal,
        activation=table.activation,
        routed=table.routed,
        reads_layer_settings=True,
        closed=table.closed,
    )


def _multiply(key: str, times: int, config: Config) -> int:
    return times * int(config[key])


def _state_sizes(config: Config, stated: Mapping[str, int]) -> dict[str, Any]:
    """Sizes that a config lacks, as its class takes them."""
    return {key: value for key, value in stated.items() if config.get(key) is None}


def read_full(table: InferredTable, config: Config) -> dict[str, Any]:
    """A config as its class reads it, with what the class leaves to the model.

    RegraftError when the class refuses it.
    """
    from .tiny_model import read_fields, read_whole

    kind = config_class(table.family)
    with silence_transformers():
        full = read_fields(read_whole(kind, config))
    for key, factors in table.filled.items():
        if full.get(key) is None:
            value = 1.0
            for factor, exponent in factors:
                value *= float(factor if factor.isdigit() else full[factor]) ** exponent
            full[key] = round(value)
    return full


def _build_part(table: InferredTable, row: Row, numbers: list[int]) -> Part:
    signature = NUMBER.sub(lambda found: str(numbers[int(found[1])]), row.signature)
    fields = {
        key: value
        for key, value in vars(row).items()
        if key not in ("role", "in_some_layers", "shapes", "signature")
    }
    part = Part(signature=signature, **fields)
    if not row.in_some_layers:
        return part
    return replace(part, in_layer=_LayerPresence(table, row))


@dataclass(frozen=True)
class _LayerPresence:
    """Whether a layer has a tensor, and in the shape that the row has: the class is asked."""

    table: InferredTable
    row: Row

    def __call__(self, config: Config, layer: int) -> bool:
        """Whether a layer of a model with this config has it."""
        found = _list_shapes(self.table.family, self.table.kind, CacheKey.of(config))
        shape = found.get((self.row.name, layer))
        if shape is None or not self.row.shapes:
            return shape is not None
        own, groups = self.row.shapes
        sizes = read_full(self.table, config)
        shapes = [tuple(evaluate_law(dict(law), sizes) for law in laws) for laws in groups]
        return shape in shapes and shapes.index(shape) == own


@dataclass(frozen=True)
class _DerivedSize:
    """A size that follows from config keys by a law."""

    law: tuple[tuple[Any, float], ...]

    def __call__(self, config: Config) -> int:
        """The size for a config."""
        return evaluate_law(dict(self.law), config)


@dataclass(frozen=True)
class _LayerRotates:
    """Whether a layer rotates queries and keys: a list of the config says so."""

    table: InferredTable

    def __call__(self, config: Config, layer: int) -> bool:
        """Whether a layer of a model with this config does."""
        key, values = self.table.rotates or ("", ())
        entries = config.get(key)
        if entries is None:  # the class derives it
            entries = read_full(self.table, config)[key]
        return entries[layer] in values


@dataclass(frozen=True)
class CacheKey:
    """A config that can be the key of a cache."""

    text: str
    config: Config = field(compare=False)

    @classmethod
    def of(cls, config: Config) -> CacheKey:
        """The key of a config."""
        return cls(repr(sorted(config.items(), key=lambda item: item[0])), config)


@dataclass(frozen=True)
class _ClassScale:
    """The factor on the scores, as the class computes it: it is asked."""

    table: InferredTable

    def __call__(self, config: Config, dim: int, layer: int) -> float:
        """The factor in all layers of a model with this config, whatever its layers do."""
        table = self.table
        return _read_scale(
            table.family, table.kind, table.slot, table.scale_name, CacheKey.of(config)
        )


@lru_cache(maxsize=8)
def _read_scale(family: str, kind: str, slot: str, name: str, config: CacheKey) -> float:
    """A number that attention modules hold, from the first that does."""
    model = build_meta(family, kind, config.config)
    pattern = re.compile(re.escape(slot).replace(r"\{\}", r"\d+"))
    held = (getattr(module, name, None) for path, module in model.named_modules()
            if pattern.fullmatch(path))  # fmt: skip
    return next(value for value in held if isinstance(value, float))


@lru_cache(maxsize=8)
def _list_shapes(
    family: str, kind: str, config: CacheKey
) -> dict[tuple[str, int], tuple[int, ...]]:
    """The shapes of a model's tensors by (template, layer), from the class on the meta device."""
    values = list_stored(build_meta(family, kind, config.config))
    parsed = {name: parse_name(name) for name in values}
    return {
        (parsed[name].template, layer): tuple(value.shape)
        for name, value in values.items()
        if (layer := parsed[name].layer) is not None
    }


def build_meta(family: str, kind: str, config: Config) -> Any:
    """A model of a class on the meta device."""
    import torch

    from ...core.class_heads import find_class
    from .tiny_model import read_whole

    with silence_transformers():
        stock = read_whole(config_class(family), copy.deepcopy(dict(config)))
        with torch.device("meta"):
            return find_class(kind)(stock)


def _build_scale(
    scale: tuple[str, float] | None, factor: str
) -> Callable[[Config, int, int], float]:
    if scale is None and not factor:
        return softmax_scale
    return partial(_compute_scale, scale, factor)


def _compute_scale(
    scale: tuple[str, float] | None, factor: str, config: Config, dim: int, layer: int
) -> float:
    base = (
        softmax_scale(config, dim, layer) if scale is None else float(config[scale[0]]) ** scale[1]
    )
    return base * float(config[factor]) if factor else base


def check_has_depth(full: Config, aliases: Mapping[str, str], family: str) -> None:
    """RegraftError for a type whose config has no number of layers, or no hidden size."""
    for kind in ("depth", "hidden"):
        if find_key(full, aliases, kind) is None:
            raise RegraftError(
                f"'{family}' has no config key for its {kind} size that regraft knows: only types "
                "with a table work there"
            )
