"""Liveness: entries of a model that no gradient reaches, and units that are alike and stay alike under training."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth.widening import kind_of
from .probe import ProbedMap, flatten_by_axis, iter_probed_maps, nonzero_rms

SAME_TOLERANCE = 1e-5  # rows that differ by less, relative to their length, are the same
SAME_MOVE_TOLERANCE = 1e-2  # so are moves that differ by less, relative to theirs: gradients carry more rounding than weights
PROBES = 4
UNITS = ("hidden", "ffn", "kv", "group", "dim")
WORDS = {
    "hidden": "hidden coordinates {}",
    "ffn": "neurons {}",
    "kv": "heads {}",
    "group": "queries {} of each group",
    "dim": "coordinates {} of each head",
}
UnitGroup = tuple[str, str, int | None]
"""An axis, which of the spaces it names, a layer: units of one lane are the same ones in all its maps."""


@dataclass(frozen=True)
class UnitProjections:
    """What tells the units of one axis of one map apart, (units, PROBES) and (units,).

    `before`: random projections of each unit's numbers, which have `length`; `move`, `way`: the same of their change.
    `awake`: units that a gradient reached.
    """

    piece: ProbedMap
    before: Tensor
    length: Tensor
    move: Tensor
    way: Tensor
    awake: Tensor


def check_liveness(
    model: str | Path | Checkpoint,
    steps: int = 3,
    seed: int = 0,
    source: str | Path | Checkpoint | None = None,
) -> dict[str, Any]:
    """What training cannot reach and cannot tell apart, seen by a few steps on random tokens or pixels.

    No file is changed. `dead`: entries whose gradient is exactly zero at every step. Only what the batch could reach is
    judged: rows of looked-up tables that it used, experts that a token chose, parameters in the forward pass, but no
    key biases, which softmax cancels; the rest counts as `unseen`. `locked`: units that repeat another one in every map
    that writes or reads them, and moved with it. With the `source` of a grown model, duplicates that it has itself are
    taken off, for each axis as many as its worst layer has; where entries are dead, `source` says how many of it the
    first gradient misses: neurons that random input leaves asleep. `share` is of the judged entries, `where` is for
    people.
    """
    if steps < 1:
        raise RegraftError(f"liveness needs at least one step, got {steps}: give 3 or more")
    known: dict[tuple[str, str], int] = defaultdict(int)
    if source is not None:
        for (axis, space, _), probes in group_projections(
            iter_probed_maps(open_checkpoint(source), steps, seed)
        ).items():
            known[axis, space] = max(known[axis, space], len(find_repeats(probes)))
    dead: list[dict[str, Any]] = []
    counts = {"judged": 0, "unseen": 0}
    lanes = group_projections(
        count_dead(iter_probed_maps(open_checkpoint(model), steps, seed), dead, counts)
    )
    units, locked = find_locked_units(lanes, known)
    entries, judged, unseen = sum(row["dead"] for row in dead), counts["judged"], counts["unseen"]
    asleep: list[dict[str, Any]] = []
    if source is not None and dead:
        deque(
            count_dead(
                iter_probed_maps(open_checkpoint(source), 1, seed), asleep, dict.fromkeys(counts, 0)
            ),
            maxlen=0,
        )
    had = {"source": sum(row["dead"] for row in asleep)} if asleep else {}
    return {
        "dead": {"entries": entries, "share": entries / max(judged, 1), "tensors": dead} | had,
        "locked": {"units": units, "tensors": locked},
        "unseen": {"entries": unseen, "share": unseen / max(judged + unseen, 1)},
    }


def open_checkpoint(model: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint, opened if it is a path."""
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)


def count_dead(
    found: Iterator[ProbedMap], dead: list[dict[str, Any]], counts: dict[str, int]
) -> Iterator[ProbedMap]:
    """Pass pieces on, adding a row to `dead` for each with entries that no gradient reached."""
    for piece in found:
        missed = piece.judged & ~piece.reached
        counts["judged"] += int(piece.judged.sum())
        counts["unseen"] += int((~piece.judged).sum())
        if count := int(missed.sum()):
            row = {"name": piece.name, "role": piece.role, "dead": count, "of": missed.numel()}
            dead.append(row | {"where": describe_coordinates(missed, piece)})
        yield piece


def find_locked_units(
    lanes: dict[UnitGroup, list[UnitProjections]], known: dict[tuple[str, str], int]
) -> tuple[int, list[dict[str, Any]]]:
    """(locked units, a row for every tensor that holds some); `known` are taken off, by axis and space."""
    total, table = 0, []
    for (axis, space, _), probes in lanes.items():
        found = find_repeats(probes)
        units = max(0, len(found) - known[axis, space])
        total += units
        text = WORDS[axis].format(format_ranges([unit for unit, _ in found]))
        for probe in probes if units else ():
            row = {"name": probe.piece.name, "role": probe.piece.role, "axis": axis, "units": units}
            table.append(
                row
                | {
                    "of": len(probe.awake),
                    "where": f"{text} repeat {format_ranges([one for _, one in found])}",
                }
            )
    return total, table


def find_unit_group(piece: ProbedMap, position: int) -> UnitGroup | None:
    """Which units an axis of a piece belongs to, with those of other pieces; None when it has no units to compare."""
    axis, reads = piece.axes[position], position >= piece.outputs
    alone = (
        piece.before.numel() == piece.before.shape[position]
    )  # one number each, which may be equal by chance
    if axis not in UNITS or alone or piece.part.axes.kind not in ("map", "plain"):
        return None
    if axis == "hidden":
        private = (piece.part.reads if reads else piece.part.writes) == "own"
        return None if private and reads else (axis, piece.role if private else "stream", None)
    space = next((word for word in piece.role.split(".") if word.isdigit()), "")  # the expert
    if axis == "dim":
        space = "queries and keys" if kind_of(piece.role) in ("q", "k") else "values"
    return axis, space, piece.layer


def group_projections(found: Iterator[ProbedMap]) -> dict[UnitGroup, list[UnitProjections]]:
    """Probes of all maps by lane."""
    lanes: dict[UnitGroup, list[UnitProjections]] = defaultdict(list)
    for piece in found:
        for position in range(len(piece.axes)):
            if (mine := find_unit_group(piece, position)) is not None:
                lanes[mine].append(project_units(piece, position))
    return lanes


def project_units(piece: ProbedMap, position: int) -> UnitProjections:
    """The probe of one axis of a piece."""
    before = flatten_by_axis(piece.before, position)
    move = flatten_by_axis(piece.after, position) - before
    draw = torch.randn((before.shape[1], PROBES), generator=torch.Generator().manual_seed(0))
    awake = flatten_by_axis(piece.reached, position).any(1)
    return UnitProjections(
        piece, before @ draw, before.norm(dim=1), move @ draw, move.norm(dim=1), awake
    )


def find_repeats(probes: list[UnitProjections]) -> list[tuple[int, int]]:
    """(unit, the first that it repeats) of units that were the same in every map and moved together, dead ones aside.

    Only neighbours in the order of one projection are compared: units far apart in it differ.
    """
    mixed = sum(
        (p.before[:, 0] / nonzero_rms(p.before[:, 0], 1.0) for p in probes), torch.zeros(())
    )
    order = mixed.argsort(stable=True)
    far = mixed[order].diff() > 1e-4
    awake = torch.stack([probe.awake for probe in probes]).any(0)
    found = []
    for run in torch.tensor_split(order, (far.nonzero()[:, 0] + 1).tolist()):
        left = run[awake[run]].sort().values
        while len(left) > 1:
            alike = matches_first(probes, left)
            found += [(int(unit), int(left[0])) for unit in left[alike][1:]]
            left = left[~alike]
    return sorted(found)


def matches_first(probes: list[UnitProjections], units: Tensor) -> Tensor:
    """Which of some units are like the first of them, in every map."""
    alike = torch.ones(len(units), dtype=torch.bool)
    first = units[0]
    for p in probes:
        alike &= (p.before[units] - p.before[first]).abs().amax(1) <= SAME_TOLERANCE * p.length[
            first
        ]
        scale = p.way[first].clamp(min=1e-3 * float(p.way.max()))
        alike &= (p.move[units] - p.move[first]).abs().amax(1) <= SAME_MOVE_TOLERANCE * scale
    return alike


def describe_coordinates(mask: Tensor, piece: ProbedMap) -> str:
    """Which coordinates of which axes, in words."""
    if bool(mask.all()):
        return "all of it"
    blank, covered, whole, some = mask | ~piece.judged, torch.zeros_like(mask), [], []
    for position in range(mask.ndim):
        some.append(flatten_by_axis(mask, position).any(1))
        whole.append(flatten_by_axis(blank, position).all(1) & some[-1])
        covered |= whole[-1].reshape([-1 if axis == position else 1 for axis in range(mask.ndim)])
    if bool((covered | ~mask).all()):
        return " and ".join(
            describe_units(piece, at, units) for at, units in enumerate(whole) if bool(units.any())
        )
    if int(mask.sum()) == math.prod(int(units.sum()) for units in some):
        return " x ".join(
            describe_units(piece, at, units)
            for at, units in enumerate(some)
            if not bool(units.all())
        )
    return "scattered"


def describe_units(piece: ProbedMap, position: int, units: Tensor) -> str:
    """Units of one axis of a piece, such as "output coordinates 8..15 of each head"."""
    axis = piece.axes[position]
    side = (
        ""
        if len(piece.axes) == piece.outputs
        else "input "
        if position >= piece.outputs
        else "output "
    )
    return side + WORDS.get(axis, f"{axis} {{}}").format(
        format_ranges(units.nonzero()[:, 0].tolist())
    )


def format_ranges(numbers: list[int], most: int = 4) -> str:
    """0, 1, 2, 5 as "0..2, 5"; a few of them."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{a}..{b}" if b > a else str(a) for a, b in spans[:most]]
    return ", ".join(shown) + (f" and {len(spans) - most} more" if len(spans) > most else "")
