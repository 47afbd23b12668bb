"""Gains of norms as part of the maps behind them: g * x read by W is x read by W diag(g)."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.anatomy import Key, Part, PlacedPart
from .widening import Widening


def can_fold_norms(widening: Widening, placed: Mapping[Key, PlacedPart]) -> bool:
    """Whether the gain of every norm over the stream can move into the maps that read it.

    Args:
        widening: answers which norms the model has.
        placed: every parameter of the source.
    """
    # Norms must have a gain alone and read the stream itself: a bias would be mixed by the map as
    # well, and the output of a norm behind a branch is added to the stream.
    norms = [part for part in widening.parts if part.norm and "hidden" in part.axes.outputs[0]]
    plain = all(part.axes.kind == "gain" and part.reads == "stream" for part in norms)

    roles = {role for role, _ in placed}
    readers = {role: one.part for (role, _), one in placed.items() if reads_stream(one.part)}
    known = all(norm_before(role, part) in roles for role, part in readers.items())

    # A tied head is the embedding too, which must not take a gain.
    tied = widening.has_tied_head and widening.family.causal
    return plain and known and not tied


def reads_stream(part: Part) -> bool:
    """Whether a part is a map of the residual stream."""
    return part.axes.kind == "map" and part.axes.inputs == ("hidden",) and not part.norm


def norm_before(role: str, part: Part) -> str:
    """The role of the norm whose output a map of the stream reads."""
    if part.reads == "head" or role == "head.weight":
        return "norm.final.weight"
    return f"norm.{role.split('.')[0]}.weight"
