"""Untie: an output embedding of its own, equal to the input embedding at first; and back: Tie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...core.anatomy import Key
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.step import step_entry
from ...errors import RegraftError

# Tensors that an untied class has and a tied one shares -> whose numbers they get.
TWINS = {"head.weight": "embed.weight", "head.own.bias": "head.bias"}
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Untie:
    """Give a model whose output embedding is tied to its input embedding one of its own, a copy.

    Adam's moments of the tied matrix go to both. Its gradient is the sum of both uses, which no
    file keeps apart: with the whole moments on each, the first steps move both as the tied matrix
    would have moved, and no step starts longer than it should.

    Preserves: the logits, bit for bit.
    Refuses: models without an output embedding, and those that have one of their own already.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with one more tensor; nothing is read."""
        config = dict(source.anatomy.untie_embeddings(source.config))
        placed = source.anatomy.place(config)
        new = [key for key in placed if key not in source.tensors]
        if not new:
            raise RegraftError(
                f"nothing to untie in '{source.origin}': {source.anatomy.family} has no output"
                " embedding that is tied: leave out --untie"
            )

        def copy(key: Key) -> LazyTensor:
            role, layer = key
            twin = TWINS[role], layer
            origin = source.tensors[twin]
            provenance = Provenance("copied", origin.provenance.sources, f"as {source.names[twin]}")
            return LazyTensor(placed[key].shape, origin.dtype, provenance, origin.read)

        tensors = {
            key: source.tensors[key] if key in source.tensors else copy(key) for key in placed
        }
        return replace(
            source,
            config=config,
            tensors=tensors,
            names={key: part.name for key, part in placed.items()},
            history=(*source.history, step_entry(self)),
        )


@dataclass(frozen=True)
class Tie:
    """Share the input embedding with an output embedding that is equal to it.

    Preserves: the logits, bit for bit.
    Refuses: an output embedding that differs, and moments of an optimiser, which differ.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with one tensor less; reads both embeddings."""
        if source.holds != "weights" or not has_equal_head(source):
            raise RegraftError(
                f"the embeddings of '{source.origin}' differ ({source.holds}): set {TIE} to false"
            )
        config = source.anatomy.resize_config(source.config, source.sizes, extra={TIE: True})
        placed = source.anatomy.place(config)
        spare = [source.names[key] for key in source.tensors if key not in placed]
        return replace(
            source,
            config=config,
            tensors={key: source.tensors[key] for key in placed},
            names={key: part.name for key, part in placed.items()},
            dropped={**source.dropped, **dict.fromkeys(spare, "tied: equal to the embedding")},
            history=(*source.history, step_entry(self)),
        )


def has_equal_head(source: Checkpoint) -> bool:
    """Whether a model has an output embedding of its own with the input embedding's values."""
    pairs = [
        (source.tensors[role, None], source.tensors[twin, None])
        for role, twin in TWINS.items()
        if (role, None) in source.tensors
    ]
    return bool(pairs) and all(torch.equal(one.read(), other.read()) for one, other in pairs)
