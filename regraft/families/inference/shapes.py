"""What every dimension of every tensor is a product of, found on the meta device.

One config key after another is doubled. A dimension that doubles with a key has it as a factor; a
dimension that does neither is a sum, whose terms follow from doubling several keys together.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.part import Config
from ...errors import first_line
from .tiny_config import DIM, INNER_HEADS, NO_SIZE
from .tiny_model import TinyModel

Shape = tuple[int, ...]
Monomial = tuple[tuple[str, int], ...]  # (config key, exponent) pairs in order
Law = dict[Monomial, float]  # a size as a sum: product of keys -> its coefficient
TERMS = 5  # most keys of a sum
LAYER = re.compile(r"\.(\d+)\.")
EXPERT = re.compile(r"(?<=experts)\.(\d+)\.")


@dataclass(frozen=True)
class TensorName:
    """The name of a tensor in a file, with "{}" for its layer and "{e}" for its expert."""

    template: str
    layer: int | None
    expert: int | None

    @property
    def module(self) -> str:
        """The name without its suffix."""
        return self.template.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """Such as "weight"."""
        return self.template.rpartition(".")[2]


def parse_name(name: str) -> TensorName:
    """The layer and the expert in the name of a tensor."""
    found = LAYER.search(name)
    layer = int(found[1]) if found else None
    template = LAYER.sub(".{}.", name, count=1)
    expert = EXPERT.search(template)
    if expert:
        template = EXPERT.sub(".{e}.", template, count=1)
    return TensorName(template, layer, int(expert[1]) if expert else None)


@dataclass
class ShapeLaws:
    """The shapes of a tiny model and how they follow from its config."""

    # Shape by name in a file.
    base: dict[str, Shape]
    # A law per dimension, by template; None where it is no sum of products of keys.
    laws: dict[str, list[Law | None]] = field(default_factory=dict)
    # Config keys that shapes depend on -> their values in the tiny config.
    sizes: dict[str, int] = field(default_factory=dict)
    # Keys that the class does not take doubled -> what it says.
    stuck: dict[str, str] = field(default_factory=dict)
    # Key of the number of experts; None without experts of their own.
    expert: str | None = None
    # Layers of the tiny model that have a tensor, by template.
    layers: dict[str, list[int]] = field(default_factory=dict)
    # Templates whose tensors differ in shape from layer to layer.
    uneven: list[str] = field(default_factory=list)


def read_shapes(tiny: TinyModel, changes: Mapping[str, Any] | None = None) -> dict[str, Shape]:
    """The shapes that a class writes to a file under changed config keys, by name."""
    values = list_stored(tiny.build(changes, "meta"))
    return {name: tuple(value.shape) for name, value in values.items()}


def list_stored(model: Any) -> dict[str, Any]:
    """Every tensor that a model is saved with, by name in the file; tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Any] = revert_weight_conversion(model, list_tensors(model))
    return stored


def list_tensors(model: Any) -> dict[str, Any]:
    """Parameters of a model and buffers that are saved, by name in the model; tied ones once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    return {**dict(model.named_parameters()), **buffers}


def find_laws(tiny: TinyModel) -> ShapeLaws:
    """How the shapes of a model follow from its config."""
    found = ShapeLaws(read_shapes(tiny))
    tried: dict[str, dict[str, Shape]] = {}
    for key, value in _list_size_keys(tiny, found.base).items():
        try:
            shapes = read_fitting_shapes(tiny, {key: 2 * value})
        except Exception as error:  # classes raise anything for sizes that do not go together
            found.stuck[key] = first_line(error)
            continue
        if shapes != found.base:
            tried[key], found.sizes[key] = shapes, value
            if _adds_experts(found.base, shapes):
                found.expert = key

    for name, shape in found.base.items():
        parsed = parse_name(name)
        if parsed.layer is not None:
            layers = found.layers.setdefault(parsed.template, [])
            if parsed.layer not in layers:
                layers.append(parsed.layer)
        if parsed.template not in found.laws:
            found.laws[parsed.template] = [
                find_law(tiny, name, position, found, tried) for position in range(len(shape))
            ]
            first = shape
        else:
            first = next(
                s for n, s in found.base.items() if parse_name(n).template == parsed.template
            )
        if shape != first and parsed.template not in found.uneven:
            found.uneven.append(parsed.template)
    return found


def _list_size_keys(tiny: TinyModel, base: Mapping[str, Shape]) -> dict[str, int]:
    """Config keys whose doubling may change shapes -> their tiny values."""
    depth = tiny.key("depth")
    keys = {
        key: value
        for key, value in tiny.config.items()
        if type(value) is int and value > 0 and key != depth and not NO_SIZE.fullmatch(key)
    }
    # Some classes take a size of heads that their config does not have.
    if not tiny.config.get("head_dim") and tiny.key("dim") in (None, "head_dim"):
        if _takes_head_dim(tiny, base):
            tiny.config["head_dim"] = keys["head_dim"] = DIM
    return keys


def _takes_head_dim(tiny: TinyModel, base: Mapping[str, Shape]) -> bool:
    try:
        return (
            read_shapes(tiny, {"head_dim": DIM}) == base != read_shapes(tiny, {"head_dim": 2 * DIM})
        )
    except Exception:  # classes raise anything for sizes that do not go together
        return False


def read_fitting_shapes(tiny: TinyModel, changes: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes under changed keys. Where the class wants the heads of its state-space layers to
    be as wide as other keys make these layers, the size of a head follows.

    Whatever the class raises, where no size of a head fits.
    """
    try:
        return read_shapes(tiny, changes)
    except Exception as error:  # classes raise anything for sizes that do not go together
        for number, size in INNER_HEADS:
            if size in changes or not (tiny.config.get(number) and tiny.config.get(size)):
                continue
            for shift in (1, -1, 2, -2):
                width = int(tiny.config[size] * 2.0**shift)
                try:
                    return read_shapes(tiny, {**changes, size: width})
                except Exception:  # as above
                    continue
        raise error


def _adds_experts(base: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> bool:
    """Whether shapes have tensors of further experts."""
    return any(EXPERT.search(name) for name in shapes if name not in base)


def find_law(
    tiny: TinyModel,
    name: str,
    position: int,
    found: ShapeLaws,
    tried: Mapping[str, Mapping[str, Shape]],
) -> Law | None:
    """The law of one dimension of a tensor; None when it is no sum of products of keys.

    Args:
        tiny: the model.
        name: of the tensor.
        position: of the dimension.
        found: shapes and sizes.
        tried: shapes under one doubled key, by key.
    """
    size = found.base[name][position]
    ratios = {
        key: shapes[name][position] / size
        for key, shapes in tried.items()
        if name in shapes and len(shapes[name]) > position
    }
    exponents = {key: math.log2(ratio) for key, ratio in ratios.items() if ratio != 1}
    if all(abs(value - round(value)) < 1e-9 for value in exponents.values()):
        monomial = tuple(sorted((key, round(value)) for key, value in exponents.items()))
        return {monomial: size / evaluate_monomial(monomial, found.sizes)}
    keys = sorted(exponents)
    return None if len(keys) > TERMS else _find_sum(tiny, name, position, found, keys)


def _find_sum(
    tiny: TinyModel, name: str, position: int, found: ShapeLaws, keys: Sequence[str]
) -> Law | None:
    """The law of a dimension that is a sum, by inclusion and exclusion over joint doublings."""
    table: dict[tuple[str, ...], int] = {(): found.base[name][position]}
    subsets = [sub for n in range(1, len(keys) + 1) for sub in itertools.combinations(keys, n)]
    for sub in subsets:
        try:
            shapes = read_fitting_shapes(tiny, {key: 2 * found.sizes[key] for key in sub})
        except Exception:  # classes raise anything for sizes that do not go together
            return None
        table[sub] = shapes[name][position]

    law: Law = {}
    for sub in [*reversed(subsets), ()]:
        value: float = sum(
            (-1) ** (len(sub) - len(part)) * table[part]
            for n in range(len(sub) + 1)
            for part in itertools.combinations(sub, n)
        )
        # Terms of more keys change too when these are doubled.
        value -= sum(
            factor * evaluate_monomial(monomial, found.sizes)
            for monomial, factor in law.items()
            if set(sub) < {key for key, _ in monomial}
        )
        monomial = tuple((key, 1) for key in sub)
        factor = value / evaluate_monomial(monomial, found.sizes)
        if abs(factor) > 1e-9:
            law[monomial] = factor
    return law


def evaluate_monomial(monomial: Monomial, sizes: Config) -> float:
    """A product of config keys."""
    return math.prod(float(sizes[key]) ** exponent for key, exponent in monomial)


def evaluate_law(law: Law, sizes: Config) -> int:
    """The size that a law gives for a config."""
    return round(sum(factor * evaluate_monomial(term, sizes) for term, factor in law.items()))


def power(*keys: str | tuple[str, int], factor: float = 1.0) -> Law:
    """The law of a product of keys, such as `power("num_heads", ("hidden_size", -1))`."""
    pairs = [(key, 1) if isinstance(key, str) else key for key in keys]
    return {tuple(sorted(pairs)): factor}
