"""Settings that a target config has and the source has not: carried where that keeps the function,
adopted where it was asked for although it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.anatomy import Key, PlacedPart
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.step import step_entry
from ...errors import RegraftError
from ...io.schema import shorten
from ...modeling.meta import build_from_config

ROPE, OLDER_ROPE = "rope_parameters", "rope_scaling"


@dataclass(frozen=True)
class Carry:
    """Set config keys that change nothing at step 0, such as the number of rotary positions or a
    dropout. Biases that they add are zero.

    Preserves: the logits, bit for bit.
    Refuses: keys that need other tensors than new biases or leave tensors over, and new biases for
    the moments of an optimiser.
    """

    keys: Mapping[str, Any]

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with the keys set."""
        config, placed = place_with_keys(source, self.keys)
        if left := sorted(source.names[key] for key in set(source.tensors) - set(placed)):
            raise RegraftError(
                f"{', '.join(self.keys)} would drop '{left[0]}' of '{source.origin}': leave it as"
                " the source has it"
            )
        tensors = {key: keep_or_zero(source, key, part) for key, part in placed.items()}
        names = {key: part.name for key, part in placed.items()}
        step = step_entry(self) | {"notes": [f"as the target has it: {format_keys(self.keys)}"]}
        history = (*source.history, step)
        return replace(source, config=config, tensors=tensors, names=names, history=history)


@dataclass(frozen=True)
class Adopt:
    """Set config keys although the function changes, such as `rope_theta`. Tensors that they leave
    over are dropped.

    Preserves: nothing.
    Refuses: keys that need tensors that the source does not have, except zero biases.
    """

    keys: Mapping[str, Any]

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with the keys set."""
        config, placed = place_with_keys(source, self.keys)
        tensors = {key: keep_or_zero(source, key, part) for key, part in placed.items()}
        reason = f"left over by {', '.join(self.keys)} of the target"
        left = {
            name: reason
            for key in set(source.tensors) - set(placed)
            for name in source.tensors[key].provenance.sources
        }
        note = f"not exact, since it is as the target has it: {format_keys(self.keys)}"
        adopted = replace(
            source,
            config=config,
            tensors=tensors,
            names={key: part.name for key, part in placed.items()},
            dropped={**source.dropped, **left},
            history=(*source.history, step_entry(self) | {"notes": [note]}),
        )

        # A class may read keys that no table knows, and have more parameters with them.
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in build_from_config(adopted).parameters())
        if (found := sum(lazy.size for lazy in tensors.values())) != needed:
            raise RegraftError(
                f"with {', '.join(self.keys)} of the target the model has {needed:,} parameters,"
                f" '{source.origin}' gives {found:,}: leave them as the source has them"
            )
        return adopted


def format_keys(keys: Mapping[str, Any]) -> str:
    """Config keys with their values, in words."""
    return ", ".join(f"{key} {shorten(value)}" for key, value in keys.items())


def place_with_keys(
    source: Checkpoint, keys: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[Key, PlacedPart]]:
    """(config, parameters by key) of a checkpoint's model with other config keys."""
    config = dict(source.config)
    if ROPE in keys:
        # Some classes let the older key win; saving writes it anew.
        host = dict(source.anatomy.host_config(config))
        stale = {OLDER_ROPE, *source.anatomy.host(config).older({**host, ROPE: keys[ROPE]})}
        host = {key: value for key, value in host.items() if key not in stale}
        config = {**config, "host": host} if "host" in config else host

    config = source.anatomy.resize_config(config, source.sizes, extra=keys)
    return config, source.anatomy.place(config)


def keep_or_zero(source: Checkpoint, key: Key, target: PlacedPart) -> LazyTensor:
    """The source's tensor, or zeros for a bias that it does not have.

    RegraftError for any other tensor, and for one of another shape.
    """
    lazy = source.tensors.get(key)
    if lazy is not None and lazy.shape == target.shape:
        return lazy
    is_bias = key[0].endswith(".bias") and not target.part.norm
    if source.holds != "weights":
        raise RegraftError(
            f"the target's settings add '{target.name}', of which the optimiser has no moments:"
            " leave out --optimizer-state"
        )
    if lazy is not None or not is_bias:
        raise RegraftError(
            f"the target's settings need '{target.name}' {list(target.shape)}, which growth does"
            f" not make from '{source.origin}': leave them as the source has them"
        )

    dtype = next(iter(source.tensors.values())).dtype
    provenance = Provenance("zero", (), "a bias that the target's settings add")
    return LazyTensor(
        target.shape, dtype, provenance, lambda: torch.zeros(target.shape, dtype=dtype)
    )
