"""Merge: T2R's feature maps become part of the projections once training is over."""

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
    """Queries and keys are never formed: W~ = W_phi W and b~ = W_phi b + b_phi (T2R, Kasai et al., arXiv 2103.13076).

    Decoding then costs no map, and with a feature size below the head's less than the source's own projections.

    Preserves: the logits, up to rounding.
    Refuses: models without T2R layers, and those that rotate or norm queries and keys before the map.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The merged checkpoint."""
        specs = source.config.get("mixers") or []
        where = [_find_unmerged(spec) for spec in specs]
        if all(prefix is None for prefix in where):
            raise RegraftError(
                f"'{source.origin}' has no t2r layer to merge: linearize with --mixer t2r, then train"
            )
        for number, prefix in enumerate(where):
            if (
                prefix is not None
                and (epsilon := source.config["attention"][number]["qk_norm"]) is not None
            ):
                raise RegraftError(
                    f"layer {number} norms queries and keys (epsilon {epsilon}) before the map: keep it"
                )
        config = {**source.config, "mixers": [_merge_spec(spec) for spec in specs]}
        tensors: dict[Key, LazyTensor] = {}
        names: dict[Key, str] = {}
        for (role, layer), spot in source.anatomy.place(config).items():
            prefix = where[layer] if layer is not None else None
            stem, _, kind = role.rpartition(".")
            names[role, layer] = spot.name
            if prefix is not None and stem in (f"mixer.{prefix}qkv.q", f"mixer.{prefix}qkv.k"):
                tensors[role, layer] = _compose_with_map(
                    source, layer, f"mixer.{prefix}", stem, kind, spot.shape
                )
            else:
                tensors[role, layer] = source.tensors[role, layer]
        history = (*source.history, step_entry(self))
        return replace(source, config=config, tensors=tensors, names=names, history=history)


def _find_unmerged(spec: dict[str, Any] | None) -> str | None:
    """Where a spec has a map to merge: "" on top, "linear." in its branch of that name; None where it has none."""
    if spec is None or spec["name"] == "t2r":
        return "" if spec and not spec.get("merged") else None
    inner = (
        (name, _find_unmerged(value)) for name, value in spec.items() if isinstance(value, dict)
    )
    return next((f"{name}.{prefix}" for name, prefix in inner if prefix is not None), None)


def _merge_spec(spec: Any) -> Any:
    """The spec with its map merged; RegraftError from the mixer where that cannot be."""
    if not isinstance(spec, dict):
        return spec
    inner = {name: _merge_spec(value) for name, value in spec.items()}
    return inner | {"merged": True} if spec["name"] == "t2r" else inner


def _compose_with_map(
    source: Checkpoint, layer: int | None, mixer: str, stem: str, kind: str, shape: tuple[int, ...]
) -> LazyTensor:
    """A projection's weight or bias followed by the map, head by head."""
    maps, offset = source.tensors[f"{mixer}map", layer], source.tensors[f"{mixer}map_bias", layer]
    before = source.tensors.get((f"{stem}.{kind}", layer))
    used = [maps, *([before] if before else []), *([offset] if kind == "bias" else [])]

    def compute() -> Tensor:
        table = maps.read().double()  # (states, features, dim)
        value = torch.zeros(shape, dtype=torch.float64)
        if before is not None:
            heads = (
                before.read().double().unflatten(0, (len(table), -1, table.shape[2]))
            )  # (states, group, dim, ...)
            value = torch.einsum("sfd,sgd...->sgf...", table, heads).reshape(shape)
        if kind == "bias":
            value = (
                value
                + offset.read()
                .double()
                .view(len(table), 1, -1)
                .expand(-1, len(value) // offset.size, -1)
                .flatten()
            )
        return value.to(maps.dtype)

    names = tuple(name for lazy in used for name in lazy.story.sources)
    return LazyTensor(
        shape,
        maps.dtype,
        Provenance("grown", names, "the feature map times the projection"),
        compute,
    )
