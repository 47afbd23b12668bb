"""The steps that lineage.json names, done again on the source, against what the output holds.

This finds what no output on a few tokens shows: one rounded weight, a row of the vocabulary, a
setting that acts on long texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import modeling
from ..core.anatomy import find_anatomy
from ..core.checkpoint import Checkpoint, with_older_keys
from ..errors import first_line
from ..growth.recorded_steps import replay_step
from ..progress import ProgressCallback

# Steps whose result the source does not determine.
NOT_REPLAYED = {
    "Train": "training moved the weights",
    "Learned": "lineage.json keeps no more than a hash of fitted maps",
    "MergeAdapter": "the adapter is not there: give --adapter too",
}
# Machines and releases may add up in another order: roundings that a number may be away.
WIDE_ULPS, NARROW_ULPS = 4, 1
# Of a config.json: who wrote it, and what tensors are compared by themselves.
NO_SETTINGS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def replay_steps(before: Checkpoint, after: Checkpoint) -> tuple[Checkpoint | None, str | None]:
    """(what the steps between two checkpoints make of the first, None), or (None, why not).

    Args:
        before: the source, as opened.
        after: the result, whose history is done again.
    """
    steps, known = list(after.history), len(before.history)
    if steps[:known] != list(before.history):
        return None, "lineage.json does not begin with the steps of the source"
    made = before
    for entry in steps[known:]:
        name = str(entry.get("step"))
        if name in NOT_REPLAYED:
            return None, f"{name}: {NOT_REPLAYED[name]}"
        try:
            made = replay_step(made, name, entry.get("arguments") or {})
        # Other versions had other steps and arguments; what those cause, no list can say.
        except Exception as error:
            return None, f"{name} cannot be done again ({first_line(error)})"
    return made, None


def find_config_differences(made: Checkpoint, after: Checkpoint) -> list[str]:
    """Keys of the output's config.json that say something else than the steps make of it.

    A key that only one of them has counts where transformers' own default says something else.

    Args:
        made: what the steps make.
        after: the output.
    """
    ours, theirs = (
        json.loads(json.dumps(with_older_keys(one.config), default=str)) for one in (made, after)
    )
    return sorted(_iter_differences(ours, theirs))


def _iter_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """See `find_config_differences`."""
    keys = [key for key in {*ours, *theirs} - set(NO_SETTINGS) if ours.get(key) != theirs.get(key)]
    full = [fill_config(config) for config in (ours, theirs)] if keys else []
    for key in keys:
        left, right = ours.get(key), theirs.get(key)
        # Missing and null alike stand for what the class takes then.
        if None not in (left, right) or full[0].get(key) != full[1].get(key):
            yield key


def fill_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with transformers' defaults, and what a linearized model has beside them."""
    host = find_anatomy(config).host_config(config)
    own = {key: value for key, value in config.items() if key not in host}
    return modeling.build_stock_config(host).to_dict() | own


def find_unequal(made: Checkpoint, after: Checkpoint, progress: ProgressCallback) -> list[str]:
    """Tensors of the output with other values than the steps make, or that one of them lacks.

    Args:
        made: what the steps make.
        after: the output.
        progress: told how far it is.
    """
    ours, theirs = (
        {one.names[key]: lazy for key, lazy in one.tensors.items()} for one in (made, after)
    )
    unequal = sorted(set(ours) ^ set(theirs))
    for count, name in enumerate(sorted(set(ours) & set(theirs))):
        progress(count / len(ours), name)
        left, right = ours[name], theirs[name]
        same = left.shape == right.shape and left.dtype == right.dtype
        if not (same and is_rounded_alike(left.read(), right.read())):
            unequal.append(name)
    return sorted(unequal)


def is_rounded_alike(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype are the same up to the rounding of their computation."""
    if torch.equal(left, right):
        return True
    wide = torch.finfo(left.dtype).eps <= torch.finfo(torch.float32).eps
    ulps = (WIDE_ULPS if wide else NARROW_ULPS) * torch.finfo(left.dtype).eps
    a, b = left.double(), right.double()
    # A sum of many numbers is off by roundings of those, however small it is itself.
    sums = WIDE_ULPS * torch.finfo(torch.float32).eps * a.square().mean().sqrt()
    # Not `all(... > ...)`: NaN is never alike, except NaN in the same place.
    alike = (a - b).abs() <= ulps * torch.maximum(a.abs(), b.abs()) + sums
    return bool((alike | (a == b) | (a.isnan() & b.isnan())).all())
