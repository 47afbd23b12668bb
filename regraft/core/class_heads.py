"""Decoders of other classes than the one with a language model's head.

The table of a decoder's family is that of its `...ForCausalLM`. A base model has the same tensors
without the head, under shorter names; a classifier has another linear layer in its place. Which
names a class has is read from transformers.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError, explain_errors
from .anatomy_defaults import label_count
from .custom_code import find_registered
from .part import Config, Part

if TYPE_CHECKING:
    from .anatomy import Anatomy

# How the classes end that have the head of a family's table.
CAUSAL = ("ForCausalLM", "LMHeadModel")
LABELS = 3  # of the model that the names are read from; nothing else has this size


def find_class(name: object) -> Any:
    """The model class with a name, of transformers or of code that the user has said to run; None
    without one.
    """
    import transformers

    # The package has functions and trainers under other names.
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(name, str) and found is None:
        found = find_registered(name)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def adapt_to_class(anatomy: Anatomy, config: Config) -> Anatomy:
    """The table of a family for the class that a config's `architectures` names.

    RegraftError when the class has a head that is not one linear layer.
    """
    name = (config.get("architectures") or [""])[0]
    if not anatomy.causal or "head.weight" not in anatomy.parts or not name:
        return anatomy  # encoders' tables have their classes themselves
    return anatomy if name.endswith(CAUSAL) else _build_class_anatomy(anatomy.family, name)


@lru_cache(maxsize=64)
def _build_class_anatomy(family: str, name: str) -> Anatomy:
    anatomy: Anatomy = importlib.import_module(
        f"regraft.families.{family.replace('-', '_')}"
    ).anatomy
    kind = find_class(name)
    if kind is None or getattr(kind.config_class, "model_type", None) != family:
        return anatomy  # transformers takes the family's default class then
    prefix, heads = _read_class_names(anatomy, kind)

    # The final norm's output is what the class gives, or what its own heads read.
    before = anatomy.parts["embed.weight"].name.split(".")[0] + "."
    parts = {
        role: replace(
            part,
            name=prefix + part.name.removeprefix(before),
            writes="normed" if part.writes == "head" else part.writes,
        )
        for role, part in anatomy.parts.items()
        if part.name.startswith(before)
    }
    return replace(
        anatomy,
        parts=parts | heads,
        slot=prefix + anatomy.slot.removeprefix(before),
        sizes=(*anatomy.sizes, ("_labels", "label")) if heads else anatomy.sizes,
        defaults={**anatomy.defaults, "_labels": label_count} if heads else anatomy.defaults,
        bridge=lambda config: None,
    )


def _read_class_names(anatomy: Anatomy, kind: Any) -> tuple[str, dict[str, Part]]:
    """(prefix of the base model's tensors, parts of the head) of a class.

    They are read from a model with one layer on the meta device.
    """
    import torch

    depth = next(key for key, axes in anatomy.sizes if axes == "depth")
    what = f"transformers cannot build a {kind.__name__}"
    with explain_errors(what, "name another class in config.json"), torch.device("meta"):
        # Sizes that the class cannot leave to itself, such as that of Ministral's heads, are said.
        full = anatomy.fill_defaults(kind.config_class().to_dict())
        sizes = {key: full[key] for key, _ in anatomy.sizes if full.get(key) is not None}
        model = kind(kind.config_class(**sizes | {depth: 1, "num_labels": LABELS}))
    base = model.base_model_prefix + "."
    if not hasattr(model, model.base_model_prefix):
        return "", {}

    heads = {}
    for name, value in model.state_dict().items():
        if name.startswith(base):
            continue
        # Rows are the labels, or where an answer begins and ends.
        axis = {LABELS: "label", 2: "two"}.get(value.shape[0])
        if axis is None or value.ndim > 2:
            raise RegraftError(
                f"no table for '{name}' of the class '{kind.__name__}' in config.json's "
                f"architectures: name the class without it"
            )
        signature = f"hidden -> {axis}" if value.ndim == 2 else f"-> {axis}"
        heads[name] = Part(name, signature, reads="normed", writes="own")
    return base, heads
