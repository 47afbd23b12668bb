"""GrowTower: one of the two towers of a model that compares texts and images, wider and deeper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...core import axes
from ...core.anatomy import Key
from ...core.checkpoint import Checkpoint
from ...core.lazy import LazyTensor, Provenance
from ...core.step import step_entry
from ...errors import RegraftError
from ...families.multimodal.two_towers import TOWERS, TwoTowerAnatomy
from ..build import parse_width_operators
from ..target_sizes import TargetSizes
from .deepen import Deepen
from .widen import Widen

PROJECTION = ("text.projection.weight", "text.projection.bias")


@dataclass(frozen=True, kw_only=True)
class GrowTower(TargetSizes):
    """Grow a tower of a CLIP or SigLIP as `Widen` and `Deepen` grow a model; the other one stays.

    Where images' vectors are as wide as the image tower (SigLIP), the map at the end of the text
    tower gets the same copies.

    Preserves: scores of texts and images, as far as `Widen` with `how` and `Deepen` with
    `depth_how` preserve logits.
    Refuses: what these refuse, and models without towers.
    """

    tower: str
    how: str = "pad"
    depth_how: str = "identity"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with the grown tower."""
        own = grown = take_tower(source, self.tower)
        for part in self.steps():
            grown = part(grown)
        result = put_tower(source, self.tower, grown)
        result = self._follow(result, own.sizes["hidden"], grown.sizes["hidden"])

        step = step_entry(self)
        if notes := [note for entry in grown.history for note in entry.get("notes", ())]:
            step["notes"] = notes
        papers = (paper for entry in grown.history for paper in entry["papers"])
        step["papers"] = list(dict.fromkeys(papers))
        return replace(result, history=(*source.history, step))

    def steps(self) -> list[Callable[[Checkpoint], Checkpoint]]:
        """What is done to the tower."""
        widths = {name: size for name, size in self.sizes.items() if name != "layers"}
        steps: list[Callable[[Checkpoint], Checkpoint]] = []
        if any(size is not None for size in widths.values()):
            fields: dict[str, Any] = {"fold": self.fold, "noise": self.noise, "seed": self.seed}
            steps.append(Widen(**widths, how=self.how, **fields))
        if self.layers is not None:
            steps.append(Deepen(self.layers, self.depth_how, self.seed))
        return steps

    def _follow(self, grown: Checkpoint, old: int, new: int) -> Checkpoint:
        """The model with texts' vectors as wide as those of images, where these got wider."""
        table = grown.anatomy
        assert isinstance(table, TwoTowerAnatomy)
        if self.tower != "vision" or old == new or not table.texts_follow:
            return grown
        index = torch.arange(new) % old
        if parse_width_operators(self.how)["hidden"] in ("duplicate", "aki"):
            index = axes.duplicate(old, new, self.seed).index

        text = {**table.tower_config(grown.config, "text"), "projection_size": new}
        keys: list[Key] = [(role, None) for role in PROJECTION]
        rows = {key: copy_rows(grown.tensors[key], index) for key in keys}
        config = table.put_tower(grown.config, "text", text)
        tensors = {**grown.tensors, **rows}
        return replace(grown, config=config, sizes=table.solve(config), tensors=tensors)


def check_towers(source: Checkpoint, tower: str | None = None) -> TwoTowerAnatomy:
    """The table of a model with two towers; RegraftError for other models and other towers."""
    table = source.anatomy
    if not isinstance(table, TwoTowerAnatomy):
        raise RegraftError(
            f"'{source.origin}' is a {table.family}, which has no towers for texts and images:"
            f" leave out --tower {tower}"
        )
    if tower is not None and tower not in TOWERS:
        raise RegraftError(f"--tower '{tower}' is none of {', '.join(TOWERS)}: use one of them")
    return table


def take_tower(source: Checkpoint, tower: str) -> Checkpoint:
    """A tower as a checkpoint of its own, without a history.

    Args:
        source: the whole model.
        tower: "text" or "vision".
    """
    whole = check_towers(source, tower)
    table, config = whole.towers[tower], whole.tower_config(source.config, tower)
    placed = table.place(config)
    return replace(
        source,
        config=config,
        anatomy=table,
        sizes=table.solve(config),
        tensors={(role, layer): source.tensors[f"{tower}.{role}", layer] for role, layer in placed},
        names={key: one.name for key, one in placed.items()},
        history=(),
    )


def put_tower(source: Checkpoint, tower: str, grown: Checkpoint) -> Checkpoint:
    """The whole model with a tower that grew.

    Args:
        source: the whole model before.
        tower: "text" or "vision".
        grown: what `take_tower` gave, after its steps.
    """
    whole = check_towers(source, tower)
    config = whole.put_tower(source.config, tower, grown.config)
    own = {(f"{tower}.{role}", layer): lazy for (role, layer), lazy in grown.tensors.items()}
    names = {key: one.name for key, one in whole.place(config).items()}
    tensors = {**source.tensors, **own}
    return replace(
        source,
        config=config,
        sizes=whole.solve(config),
        tensors={key: tensors[key] for key in names},
        names=names,
    )


def copy_rows(lazy: LazyTensor, index: Tensor) -> LazyTensor:
    """A tensor with rows of another one: row i is its row `index[i]`."""
    note = f"{len(index)} rows, as wide as images' vectors"
    provenance = Provenance("grown", lazy.provenance.sources, note)
    shape = (len(index), *lazy.shape[1:])
    return replace(lazy, shape=shape, provenance=provenance, read=lambda: lazy.read()[index])
