"""Liveness: entries that no gradient reaches, and duplicate units that training cannot separate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth.widening import kind_of
from .probe import ProbedMap, align_to_axis, flatten_by_axis, iter_probed_maps, nonzero_rms

# Rows that differ by less, relative to their length, are the same.
SAME_TOLERANCE = 1e-5
# So are moves that differ by less: gradients carry more rounding than weights.
SAME_MOVE_TOLERANCE = 1e-2
NEIGHBOUR_TOLERANCE = 1e-4  # of projections; larger gaps are between units that differ
SMALLEST_MOVE = 1e-3  # of the largest move of an axis; below it moves are compared with this
PROJECTIONS = 4
UNIT_AXES = ("hidden", "ffn", "kv", "group", "dim")
AXIS_WORDS = {
    "hidden": "hidden coordinates {}",
    "ffn": "neurons {}",
    "kv": "heads {}",
    "group": "queries {} of each group",
    "dim": "coordinates {} of each head",
}
UnitGroup = tuple[str, str, int | None]
"""An axis, which of its spaces, a layer: all maps of a group have the same units."""


class DeadTensor(TypedDict):
    """A tensor with entries that no gradient reached."""

    name: str
    role: str
    # How many, of how many.
    dead: int
    of: int
    # For people.
    where: str


class DeadEntries(TypedDict):
    """Entries whose gradient is exactly zero at every step."""

    entries: int
    # Of the judged ones.
    share: float
    tensors: list[DeadTensor]
    # How many of the source's own entries its first gradient misses: neurons that random input
    # leaves asleep. Only with a source, and only where entries are dead.
    source: NotRequired[int]


class LockedTensor(TypedDict):
    """A tensor with duplicate units that training cannot separate."""

    name: str
    role: str
    axis: str
    # How many units repeat another one, of how many.
    units: int
    of: int
    # For people.
    where: str


class LockedUnits(TypedDict):
    """Units that repeat another one in every map that writes or reads them, and moved with it."""

    units: int
    tensors: list[LockedTensor]


class UnseenEntries(TypedDict):
    """Entries that the batch could not reach."""

    entries: int
    # Of all entries.
    share: float


class Liveness(TypedDict):
    """What training cannot reach and cannot tell apart."""

    dead: DeadEntries
    locked: LockedUnits
    unseen: UnseenEntries


@dataclass(frozen=True)
class UnitProjections:
    """What tells the units of one axis of one map apart.

    Attributes:
        probed: the map.
        before: random projections of each unit's numbers, (units, PROJECTIONS).
        length: norm of each unit's numbers, (units,).
        move: projections of what the steps changed.
        move_length: norm of that change.
        awake: units that a gradient reached.
    """

    probed: ProbedMap
    before: Tensor
    length: Tensor
    move: Tensor
    move_length: Tensor
    awake: Tensor


Groups = dict[UnitGroup, list[UnitProjections]]


@dataclass
class DeadCounter:
    """Counts dead entries, map by map.

    Attributes:
        tensors: a row for each map with dead entries.
        judged: entries that the batch could reach.
        unseen: entries that it could not.
    """

    tensors: list[DeadTensor] = field(default_factory=list)
    judged: int = 0
    unseen: int = 0

    @property
    def entries(self) -> int:
        """Dead entries of all maps."""
        return sum(row["dead"] for row in self.tensors)

    def add(self, probed: ProbedMap) -> None:
        """Count one map."""
        dead = probed.judged & ~probed.reached
        self.judged += int(probed.judged.sum())
        self.unseen += int((~probed.judged).sum())
        if count := int(dead.sum()):
            self.tensors.append(
                {
                    "name": probed.name,
                    "role": probed.role,
                    "dead": count,
                    "of": dead.numel(),
                    "where": describe_coordinates(dead, probed),
                }
            )


def check_liveness(
    model: str | Path | Checkpoint,
    steps: int = 3,
    seed: int = 0,
    source: str | Path | Checkpoint | None = None,
) -> Liveness:
    """What training cannot reach and cannot separate, seen by a few steps on random input.

    No file is changed. Only what the batch could reach is judged: rows of looked-up tables that it
    used, experts that a token chose, parameters in the forward pass, but no key biases, which
    softmax cancels. The rest counts as `unseen`.

    Args:
        model: what is tried.
        steps: of training; one does not reach what waits behind zeros.
        seed: of the random tokens or pixels.
        source: what the model was grown from. Duplicates that it has itself are taken off, for
            each axis as many as its worst layer has.
    """
    if steps < 1:
        raise RegraftError(f"liveness needs at least one step, got {steps}: give 3 or more")

    known: dict[tuple[str, str], int] = defaultdict(int)
    if source is not None:
        groups: Groups = defaultdict(list)
        for probed in iter_probed_maps(open_checkpoint(source), steps, seed):
            add_projections(groups, probed)
        for (axis, space, _), projections in groups.items():
            known[axis, space] = max(known[axis, space], len(find_repeats(projections)))

    dead, groups = DeadCounter(), defaultdict(list)
    for probed in iter_probed_maps(open_checkpoint(model), steps, seed):
        dead.add(probed)
        add_projections(groups, probed)
    units, locked = find_locked_units(groups, known)

    result: Liveness = {
        "dead": {
            "entries": dead.entries,
            "share": dead.entries / max(dead.judged, 1),
            "tensors": dead.tensors,
        },
        "locked": {"units": units, "tensors": locked},
        "unseen": {
            "entries": dead.unseen,
            "share": dead.unseen / max(dead.judged + dead.unseen, 1),
        },
    }

    # One step on the source: nothing of it waits behind zeros that growth has made.
    if source is not None and dead.tensors:
        asleep = DeadCounter()
        for probed in iter_probed_maps(open_checkpoint(source), 1, seed):
            asleep.add(probed)
        if asleep.tensors:
            result["dead"]["source"] = asleep.entries
    return result


def open_checkpoint(model: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint, opened if it is a path."""
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)


def find_locked_units(
    groups: Groups, known: dict[tuple[str, str], int]
) -> tuple[int, list[LockedTensor]]:
    """Duplicate units that training cannot separate.

    Args:
        groups: projections of all maps.
        known: duplicates that the source has itself, by axis and space.

    Returns:
        Their number, and a row for every tensor that holds some.
    """
    total, tensors = 0, list[LockedTensor]()
    for (axis, space, _), projections in groups.items():
        repeats = find_repeats(projections)
        units = max(0, len(repeats) - known[axis, space])
        if not units:
            continue
        total += units

        copies = AXIS_WORDS[axis].format(format_ranges([unit for unit, _ in repeats]))
        where = f"{copies} repeat {format_ranges([first for _, first in repeats])}"
        for one in projections:
            tensors.append(
                {
                    "name": one.probed.name,
                    "role": one.probed.role,
                    "axis": axis,
                    "units": units,
                    "of": len(one.awake),
                    "where": where,
                }
            )
    return total, tensors


def find_unit_group(probed: ProbedMap, position: int) -> UnitGroup | None:
    """Which group the units of an axis of a map belong to; None where units cannot be compared."""
    axis, is_input = probed.axes[position], position >= probed.outputs
    # One number for each unit, as in a bias, may be equal by chance.
    is_alone = probed.before.numel() == probed.before.shape[position]
    if axis not in UNIT_AXES or is_alone or probed.part.axes.kind not in ("map", "plain"):
        return None

    # The stream is one space over all layers; what a part keeps to itself is its own.
    if axis == "hidden":
        is_own = (probed.part.reads if is_input else probed.part.writes) == "own"
        if is_own and is_input:
            return None
        return axis, probed.role if is_own else "stream", None

    # Queries and keys meet in dot products, so that their coordinates are the same units.
    if axis == "dim":
        space = "queries and keys" if kind_of(probed.role) in ("q", "k") else "values"
        return axis, space, probed.layer
    expert = next((word for word in probed.role.split(".") if word.isdigit()), "")
    return axis, expert, probed.layer


def add_projections(groups: Groups, probed: ProbedMap) -> None:
    """Add the projections of all axes of a map to the groups they belong to."""
    for position in range(len(probed.axes)):
        group = find_unit_group(probed, position)
        if group is not None:
            groups[group].append(project_units(probed, position))


def project_units(probed: ProbedMap, position: int) -> UnitProjections:
    """The projections of one axis of a map."""
    before = flatten_by_axis(probed.before, position)
    move = flatten_by_axis(probed.after, position) - before
    # The same draw for all maps of a shape: equal units have equal projections.
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn((before.shape[1], PROJECTIONS), generator=generator)
    awake = flatten_by_axis(probed.reached, position).any(1)
    return UnitProjections(
        probed, before @ draw, before.norm(dim=1), move @ draw, move.norm(dim=1), awake
    )


def find_repeats(projections: list[UnitProjections]) -> list[tuple[int, int]]:
    """(unit, the first that it repeats) of units that were the same in all maps and moved together.

    Units that no gradient reached are left out. Only neighbours in the order of one projection are
    compared: units far apart in it differ.
    """
    # One number per unit, from all maps in units of each one's own spread.
    first_projections = [one.before[:, 0] for one in projections]
    mixed = sum((value / nonzero_rms(value, 1.0) for value in first_projections), torch.zeros(()))
    order = mixed.argsort(stable=True)
    gaps = mixed[order].diff() > NEIGHBOUR_TOLERANCE
    awake = torch.stack([one.awake for one in projections]).any(0)

    repeats = []
    for run in torch.tensor_split(order, (gaps.nonzero()[:, 0] + 1).tolist()):
        # A run may hold several sets of duplicates: take out that of the first unit, and again.
        left = run[awake[run]].sort().values
        while len(left) > 1:
            alike = matches_first(projections, left)
            repeats += [(int(unit), int(left[0])) for unit in left[alike][1:]]
            left = left[~alike]
    return sorted(repeats)


def matches_first(projections: list[UnitProjections], units: Tensor) -> Tensor:
    """Which of some units are like the first of them, in every map; the first is, (units,)."""
    alike = torch.ones(len(units), dtype=torch.bool)
    first = units[0]
    for one in projections:
        difference = (one.before[units] - one.before[first]).abs().amax(1)
        alike &= difference <= SAME_TOLERANCE * one.length[first]

        # A unit that hardly moves has a change of mere rounding: it is held against the others'.
        smallest = SMALLEST_MOVE * float(one.move_length.max())
        scale = one.move_length[first].clamp(min=smallest)
        difference = (one.move[units] - one.move[first]).abs().amax(1)
        alike &= difference <= SAME_MOVE_TOLERANCE * scale
    return alike


def describe_coordinates(mask: Tensor, probed: ProbedMap) -> str:
    """Where the entries of a mask are, in words; "scattered" where no few words tell."""
    if bool(mask.all()):
        return "all of it"

    # By axis: units with any entry in the mask, and units all of whose judged entries are in it.
    touched, whole = list[Tensor](), list[Tensor]()
    covered = torch.zeros_like(mask)
    for position in range(mask.ndim):
        touched.append(flatten_by_axis(mask, position).any(1))
        is_whole = flatten_by_axis(mask | ~probed.judged, position).all(1) & touched[-1]
        whole.append(is_whole)
        covered |= align_to_axis(is_whole, position, mask.ndim)

    # Whole rows and columns that together make up the mask.
    if bool((covered | ~mask).all()):
        return " and ".join(
            describe_units(probed, position, units)
            for position, units in enumerate(whole)
            if bool(units.any())
        )

    # A block: some units of each axis, in all combinations.
    if int(mask.sum()) == math.prod(int(units.sum()) for units in touched):
        return " x ".join(
            describe_units(probed, position, units)
            for position, units in enumerate(touched)
            if not bool(units.all())
        )
    return "scattered"


def describe_units(probed: ProbedMap, position: int, units: Tensor) -> str:
    """Units of one axis of a map, such as "output coordinates 8..15 of each head"."""
    side = "input " if position >= probed.outputs else "output "
    if len(probed.axes) == probed.outputs:  # nothing is read: there are no two sides
        side = ""
    axis = probed.axes[position]
    words = AXIS_WORDS.get(axis, f"{axis} {{}}")
    return side + words.format(format_ranges(units.nonzero()[:, 0].tolist()))


def format_ranges(numbers: Sequence[int], most: int = 4) -> str:
    """Numbers 0, 1, 2, 5 as "0..2, 5"; at most `most` ranges, and how many more there are."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])

    shown = ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in ranges[:most])
    return shown + (f" and {len(ranges) - most} more" if len(ranges) > most else "")
