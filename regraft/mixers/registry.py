"""Mixers by name, discovered by folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypedDict

from ..errors import RegraftError
from ..io.schema import check_json
from .attention import Attention
from .base import Mixer
from .inherit import apply_inherit, parse_inherit
from .weight_spec import WeightSpec


class _RequiredSpecFields(TypedDict):
    name: str


class MixerSpec(_RequiredSpecFields, total=False):
    """What every mixer's spec has; its other keys are the mixer's options."""

    inherit: str  # see `inherit.parse_inherit`


@cache
def mixers() -> dict[str, type[Mixer]]:
    """Every mixer of this folder by its `name`."""
    # Importing a module defines its classes, which is all that registers them.
    package = __package__ or "regraft.mixers"
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return {mixer.name: mixer for mixer in _iter_subclasses(Mixer) if "name" in vars(mixer)}


def _iter_subclasses(mixer: type[Mixer]) -> Iterator[type[Mixer]]:
    for child in mixer.__subclasses__():
        yield child
        yield from _iter_subclasses(child)


def mixer_class(name: str) -> type[Mixer]:
    """The class registered as `name`; RegraftError for an unknown name."""
    if name not in mixers():
        # A mixer beside a window is made by the width of the window, not by its name.
        names = sorted({*mixers()} - {"gated"})
        raise RegraftError(f"unknown mixer '{name}': use one of {', '.join(names)}")
    return mixers()[name]


def begins_with_bos(specs: Iterable[Mapping[str, Any] | None] | None) -> bool:
    """Whether one of a model's mixers is made for texts that begin with the BOS token.

    Args:
        specs: of the mixers by layer, as in its config; None for a model without any.
    """
    return any(mixer_class(spec["name"]).begins_with_bos for spec in specs or () if spec)


def validate(spec: dict[str, Any]) -> None:
    """Raise RegraftError unless `spec` names a mixer and options it has."""
    check_json(spec, MixerSpec, "a mixer's spec", f"the mixers are {', '.join(sorted(mixers()))}")
    options = mixer_class(spec["name"]).parse(spec)
    parse_inherit(spec.get("inherit", "all"))
    for nested in vars(options).values():
        if isinstance(nested, dict):
            validate(nested)


def weights(spec: dict[str, Any], attention: Attention) -> dict[str, WeightSpec]:
    """Local parameter name -> WeightSpec of a mixer spec.

    The spec's key `inherit` says which of the source's projections are copied.
    """
    table = mixer_class(spec["name"]).weights(attention, spec)
    return apply_inherit(table, spec.get("inherit", "all"), attention.hidden)


def build(spec: dict[str, Any], attention: Attention) -> Mixer:
    """The mixer of a spec with uninitialised weights."""
    return mixer_class(spec["name"])(attention, spec)
