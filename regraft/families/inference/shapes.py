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
from .tiny_config import DIM, INNER_HEADS, NO_SIZE, find_kind
from .tiny_model import TinyModel

Shape = tuple[int, ...]
Monomial = tuple[tuple[str, int], ...]  # (config key, exponent) pairs in order
Law = dict[Monomial, float]  # a size as a sum: product of keys -> its coefficient
TERMS = 5  # most keys of a sum
# Lists of projections beside the stack are counted too, but are no layers.
LAYER = re.compile(r"(?<!projections)\.(\d+)\.")
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
    # A law per dimension, by template; None where it is no sum of products of keys. Where layers
    # differ in the shape, "#1" and so on behind the template tell their laws apart.
    laws: dict[str, list[Law | None]] = field(default_factory=dict)
    # Config keys that shapes depend on -> their values in the tiny config.
    sizes: dict[str, int] = field(default_factory=dict)
    # Keys that the class does not take doubled -> what it says.
    stuck: dict[str, str] = field(default_factory=dict)
    # Key of the number of experts; None without experts of their own.
    expert: str | None = None
    # Layers of the tiny model that have a tensor, by template.
    layers: dict[str, list[int]] = field(default_factory=dict)
    # First tensor, by template.
    first: dict[str, str] = field(default_factory=dict)


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
        group = _find_group(found, parsed.template, shape)
        if group not in found.laws:
            found.first[group] = name
            found.laws[group] = [
                find_law(tiny, name, position, found, tried) for position in range(len(shape))
            ]
        if parsed.layer is not None:
            layers = found.layers.setdefault(group, [])
            if parsed.layer not in layers:
                layers.append(parsed.layer)
    if found.expert is None:
        found.expert = _find_stacked_expert_key(tiny, found)
    return found


def _find_group(found: ShapeLaws, template: str, shape: Shape) -> str:
    """The template of a tensor; with a number behind it where layers differ in its shape."""
    for number in itertools.count():
        group = f"{template}#{number}" if number else template
        if group not in found.first or found.base[found.first[group]] == shape:
            return group
    raise AssertionError("unreachable")


def list_groups(found: ShapeLaws, group: str) -> list[list[Law | None]]:
    """The laws of a tensor's shapes, one for each that its layers have.

    Args:
        found: of the model.
        group: a template, with or without a number.
    """
    template = group.partition("#")[0]
    return [laws for other, laws in found.laws.items() if other.partition("#")[0] == template]


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


def _find_stacked_expert_key(tiny: TinyModel, found: ShapeLaws) -> str | None:
    """The config key of the number of experts in tensors of three dimensions; None without."""
    first = [laws[0] for laws in found.laws.values() if len(laws) == 3]
    keys = (key for key in found.sizes if find_kind(key, tiny.aliases) == "expert")
    return next((key for key in keys if power(key) in first), None)


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
    if ratio := _find_ratio_sum(tiny, name, position, found, exponents):
        return ratio
    return None if len(keys) > TERMS else _find_sum(tiny, name, position, found, keys)


def _find_ratio_sum(
    tiny: TinyModel,
    name: str,
    position: int,
    found: ShapeLaws,
    exponents: Mapping[str, float],
) -> Law | None:
    """The law of a dimension that is a product times (1 + c k / n), such as hidden + 2 hidden /
    heads; None when it is none.

    Args:
        tiny: the model.
        name: of the tensor.
        position: of the dimension.
        found: shapes and sizes.
        exponents: by what power of two it grows with each doubled key.
    """
    common = [key for key, exponent in exponents.items() if abs(exponent - 1) < 1e-9]
    others = [key for key in exponents if key not in common]
    under = next((key for key in others if exponents[key] < 0), None)
    if under is None or len(others) > 2:
        return None
    over = [key for key in others if key != under]

    def read(*factors: tuple[str, int]) -> int:
        changes = {key: factor * found.sizes[key] for key, factor in factors}
        return read_shapes(tiny, changes)[name][position]

    try:
        base, halved, quartered = read(), read((under, 2)), read((under, 4))
        same = [read((key, 2), (under, 2)) for key in over]
    except Exception:  # classes raise anything for sizes that do not go together
        return None
    share = 2 * (base - halved)  # what is divided by the key
    if share != 4 * (halved - quartered) or any(value != base for value in same):
        return None
    whole = tuple(sorted((key, 1) for key in common))
    part = tuple(sorted([*whole, *((key, 1) for key in over), (under, -1)]))
    terms = {whole: base - share, part: share}
    return {
        term: value / evaluate_monomial(term, found.sizes) for term, value in terms.items() if value
    }


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
