"""Learned: the growth that LiGO's maps make, folded into a stock checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.anatomy import Key
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.shapes import Float
from ...errors import RegraftError
from .. import build, depth
from ..ligo import Grower
from ..ligo_from_copy import GrowerFromCopy
from ..ligo_options import COPY, RANDOM_STARTS, Ligo
from ..target_sizes import TargetSizes
from .transplant import Transplant

PAPERS = ["LiGO, arXiv 2303.00980"]


@dataclass(frozen=True)
class Learned(TargetSizes):
    """Grow by learned maps of axes and layers (LiGO, arXiv 2303.00980; docs/concepts/ligo.md).

    Preserves: nothing exactly, except by reads `inverse` what is linear, and by reads `orthogonal`
    with start `pad`, blur 0 and depth `llama_pro` the logits of families with root-mean-square
    norms and an output embedding of its own.
    Refuses: smaller sizes, dense maps of heads that turn or are grouped, moments of an optimiser.
    """

    # LiGO's options.
    method: Ligo = field(default_factory=Ligo)
    # Of everything random.
    seed: int = 0
    # The maps by name once `regraft.train.fit_ligo.fit_maps` has learned them; empty: their start.
    maps: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    # What learning them took.
    cost: Mapping[str, int | float] = field(default_factory=dict)

    def build_grower(self, source: Checkpoint) -> Grower:
        """The grown model as a differentiable function of the maps; RegraftError for moments."""
        if source.holds != "weights":
            raise RegraftError(
                f"learned maps grow weights, not {source.holds}: train with fresh moments"
            )

        # Random maps and the copy keep nothing exactly, so they may take sizes that an exact start
        # cannot.
        method, old, new = self.method, source.layers, self.layers or source.layers
        copies = method.start == COPY
        if method.start in RANDOM_STARTS:
            widening = build.build_inexact_widening(source, self, self.seed, folds=not copies)
        else:
            widening = build.build_widening(source, self, method.start, noise=0.0, seed=self.seed)

        if copies:
            # Layers beyond the source's are random; their origin only decides per-layer settings.
            order = [depth.LayerOrigin(min(layer, old - 1)) for layer in range(new)]
            start = Transplant(**self.sizes, seed=self.seed)(source)
            grower: Grower = GrowerFromCopy(widening, order, method, self.seed, start)
        else:
            order = depth.build_layer_order(method.depth, old, new)
            grower = Grower(widening, order, method, self.seed)
        if self.maps:
            grower.load_state_dict(dict(self.maps))
        return grower

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The grown checkpoint; every tensor is computed when it is read."""
        grower = self.build_grower(source)
        order = [layer.source for layer in grower.order]
        sizes = {**grower.widening.sizes, "depth": len(order)}
        config = source.anatomy.resize_config(dict(grower.widening.config), sizes, order)

        # A tensor of the target may take from every layer of the source: all of them are its
        # origins.
        tensors: dict[Key, LazyTensor] = {}
        targets = source.anatomy.place(config)
        for key, target in targets.items():
            role, layer = key
            layers = [None] if layer is None else list(range(source.layers))
            lazies = [source.tensors[role, one] for one in layers]
            origins = tuple(name for lazy in lazies for name in lazy.provenance.sources)
            provenance = Provenance("grown", origins, f"learned, '{target.part.signature}'")
            dtype = lazies[0].dtype
            read = partial(_read_tensor, grower, key, dtype)
            tensors[key] = LazyTensor(target.shape, dtype, provenance, read)
        names = {key: target.name for key, target in targets.items()}
        history = (*source.history, self.lineage_entry())
        return dataclasses.replace(
            source, config=config, sizes=sizes, tensors=tensors, names=names, history=history
        )

    def lineage_entry(self) -> dict[str, Any]:
        """The step as lineage.json keeps it."""
        # Maps may be large: a hash stands for them, and `cost` is no argument.
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("maps", "cost")
        }
        digest = hashlib.sha256()
        for name, value in sorted(self.maps.items()):
            digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        arguments = fields | {"method": dataclasses.asdict(self.method)}
        return {
            "step": "Learned",
            "arguments": arguments,
            "cost": dict(self.cost),
            "maps": digest.hexdigest(),
            "papers": PAPERS,
        }


def _read_tensor(grower: Grower, key: Key, dtype: torch.dtype) -> Float[Tensor, "*stored"]:
    return grower.compute_tensor(key).to(dtype)
