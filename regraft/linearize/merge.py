"""Merge: T2R's feature maps become part of the projections after training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.step import step_entry
from ..errors import RegraftError


@dataclass(frozen=True)
class Merge:
    """Fold the feature maps into the projections of queries and keys (T2R, arXiv 2103.13076).

    W~ = W_phi W and b~ = W_phi b + b_phi (Kasai et al.): queries and keys are never
    formed. Decoding then costs no map and, with fewer features than a head has dimensions, less
    than the source's own projections.

    Preserves: the logits, up to rounding.
    Refuses: models without T2R layers, and those that rotate or norm queries and keys before the
    map.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The merged checkpoint."""
        specs = source.config.get("mixers") or []
        prefixes = [_find_unmerged(spec) for spec in specs]
        _check_mergeable(source, prefixes)
        config = {**source.config, "mixers": [_merge_spec(spec) for spec in specs]}

        # The merged config has other shapes: no maps, and projections as wide as their features.
        tensors: dict[Key, LazyTensor] = {}
        names: dict[Key, str] = {}
        for (role, layer), placed in source.anatomy.place(config).items():
            prefix = prefixes[layer] if layer is not None else None
            names[role, layer] = placed.name
            stem, _, kind = role.rpartition(".")  # "mixer.q_proj", "weight"
            if prefix is not None and stem in (f"mixer.{prefix}q_proj", f"mixer.{prefix}k_proj"):
                tensors[role, layer] = _compose_with_map(
                    source, layer, f"mixer.{prefix}", stem, kind, placed.shape
                )
            else:
                tensors[role, layer] = source.tensors[role, layer]
        history = (*source.history, step_entry(self))
        return replace(source, config=config, tensors=tensors, names=names, history=history)


def _check_mergeable(source: Checkpoint, prefixes: list[str | None]) -> None:
    """RegraftError when no layer has a map to merge, or a norm stands before one."""
    if all(prefix is None for prefix in prefixes):
        raise RegraftError(
            f"'{source.origin}' has no t2r layer to merge: linearize with --mixer t2r, then train"
        )
    for number, prefix in enumerate(prefixes):
        if prefix is None:
            continue
        epsilon = source.config["attention"][number]["qk_norm"]
        if epsilon is not None:
            raise RegraftError(
                f"layer {number} norms queries and keys (epsilon {epsilon}) before the map: keep it"
            )
        limit = source.config["attention"][number].get("clip")
        if limit is not None:
            raise RegraftError(
                f"layer {number} clips queries and keys to {limit:g} before the map: keep it"
            )


def _find_unmerged(spec: dict[str, Any] | None) -> str | None:
    """Where a layer's mixer has a map to merge; None where it has none.

    "" when the mixer itself is T2R, "linear." when its branch `linear` is (beside a window).
    """
    if spec is None:
        return None
    if spec["name"] == "t2r":
        return None if spec.get("merged") else ""
    for name, value in spec.items():
        if isinstance(value, dict):
            prefix = _find_unmerged(value)
            if prefix is not None:
                return f"{name}.{prefix}"
    return None


def _merge_spec(spec: Any) -> Any:
    """A layer's mixer with its map marked as merged, branches included."""
    if not isinstance(spec, dict):
        return spec
    inner = {name: _merge_spec(value) for name, value in spec.items()}
    return inner | {"merged": True} if spec["name"] == "t2r" else inner


def _compose_with_map(
    source: Checkpoint, layer: int | None, mixer: str, stem: str, kind: str, shape: tuple[int, ...]
) -> LazyTensor:
    """A projection's weight or bias followed by the map, head by head.

    Args:
        source: the checkpoint with maps.
        layer: its number.
        mixer: role of the T2R mixer, such as "mixer." or "mixer.linear.".
        stem: role of the projection.
        kind: "weight" or "bias".
        shape: of the merged tensor.
    """
    maps, offset = source.tensors[f"{mixer}map", layer], source.tensors[f"{mixer}map_bias", layer]
    before = source.tensors.get((f"{stem}.{kind}", layer))  # a source may have no bias
    used = [maps, *([before] if before else []), *([offset] if kind == "bias" else [])]

    def compute() -> Tensor:
        table = maps.read().double()  # (states, features, dim)
        value = torch.zeros(shape, dtype=torch.float64)
        if before is not None:
            # (states, group, dim, hidden) of a weight, (states, group, dim) of a bias: the query
            # heads of a group share a state and so a map
            heads = before.read().double().unflatten(0, (len(table), -1, table.shape[2]))
            value = torch.einsum("sfd,sgd...->sgf...", table, heads).reshape(shape)
        if kind == "bias":
            per_state = offset.read().double().view(len(table), 1, -1)  # (states, 1, features)
            value = value + per_state.expand(-1, len(value) // offset.size, -1).flatten()
        return value.to(maps.dtype)

    names = tuple(name for lazy in used for name in lazy.provenance.sources)
    return LazyTensor(
        shape,
        maps.dtype,
        Provenance("grown", names, "the feature map times the projection"),
        compute,
    )
