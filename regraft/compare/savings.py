"""Curves of all runs to numbers: losses, and what each arm saves until it has scratch's final loss."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io.files import read_json_if_exists, read_json_lines
from . import arm as arms
from .recipe import Comparison

AXES = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run, or the mean of several: running totals of tokens, FLOPs and seconds, held-out loss.

    `kl`: to the source, of arms that have it as their teacher.
    """

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    accuracy: list[float]
    kl: list[float] = field(default_factory=list)

    def totals(self, axis: str) -> list[float]:
        """Totals of an axis: tokens, flops or seconds."""
        values: list[float] = getattr(self, axis)
        return values

    def json(self) -> dict[str, list[float]]:
        """Plain values."""
        return {name: list(values) for name, values in vars(self).items()}


def read_curve(folder: Path, facts: Mapping[str, Any]) -> Curve:
    """The curve of a finished run; what its start cost and earlier stages are counted in.

    While a sub-model is trained, the whole model, which is what counts, is not measured: those points are left out.
    """
    spent = facts.get("start", arms.NO_COST)
    entries = facts["ledger"]["stages"]
    legs = facts["arm"]["legs"] if "arm" in facts else []
    inner = {index for index, leg in enumerate(legs) if leg["layers"].startswith("bottom")}
    rows = []
    if 0 in inner:
        rows.append(
            [*(spent[key] for key in AXES), facts["whole"]["loss"], facts["whole"]["accuracy"]]
        )
    for row in (row for row in read_json_lines(folder / "metrics.jsonl") if "eval_loss" in row):
        before = entries[: row["stage"]]
        repeated = (
            row["step"] == 0 and before and row["stage"] - 1 not in inner
        )  # the end of the stage before it
        if repeated or row["stage"] in inner:
            continue
        totals = [sum(e[key] for e in before) + row[key] + spent[key] for key in AXES]
        rows.append(
            [
                *totals,
                *(row[key] for key in ("eval_loss", "eval_accuracy", "eval_kl") if key in row),
            ]
        )
    if not rows:
        raise RegraftError(
            f"{folder}/metrics.jsonl has no evaluation: delete {folder} and run the command again"
        )
    return Curve(*(list(column) for column in zip(*rows, strict=True)))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, evaluation by evaluation."""
    names = list(vars(curves[0]))
    columns = (zip(*(getattr(curve, name) for curve in curves), strict=True) for name in names)
    return Curve(*([statistics.fmean(values) for values in column] for column in columns))


def find_crossing(totals: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The total at which a curve first has the target loss, linear between evaluations; None when it never has."""
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return totals[0]
            share = (losses[index - 1] - target) / (losses[index - 1] - loss)
            return totals[index - 1] + share * (totals[index] - totals[index - 1])
    return None


def compute_savings(
    curve: Curve, scratch: Curve, source: Mapping[str, float]
) -> dict[str, float | None]:
    """What a curve saves against scratch until it has scratch's last loss, as a share of scratch's FLOPs and in
    seconds, without and with the source's pretraining, and how many times less it takes (`times`, None where it starts
    there); None when it never has that loss.

    Scratch itself saves nothing, whatever its curve did before the end.
    """
    found: dict[str, float | None] = {}
    for axis in AXES:
        own = scratch.totals(axis)[-1]
        reached = (
            own
            if curve is scratch
            else find_crossing(curve.totals(axis), curve.loss, scratch.loss[-1])
        )
        found |= {f"{axis}_to_reach": reached, f"times_{axis}": own / reached if reached else None}
        for name, extra in (("", 0.0), ("_with_source", source[axis])):
            gained = None if reached is None else own - reached - extra
            found[f"saved_{axis}{name}"] = gained
            found[f"saved_{axis}_share{name}"] = None if gained is None else gained / own
    return found


def mean_and_std(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (of a sample) of what there is; None for none, 0 for the deviation of one."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "std": None, "count": 0}
    return {"mean": statistics.fmean(found), "std": statistics.stdev(found) if len(found) > 1 else 0.0,
            "count": len(found)}  # fmt: skip


def summarise(recipe: Comparison, out: Path) -> dict[str, Any]:
    """The numbers of a comparison from its finished runs."""
    found = {arm.name: load_finished_runs(out, arm.name, recipe.seeds) for arm in recipe.arms}
    table: dict[str, Any] = {"task": recipe.task, "seeds": recipe.seeds, "arms": {}}
    table["step"] = recipe.stage(recipe.train).length * recipe.train.batch
    table["sources"] = {name: source_numbers(recipe, out, name) for name in recipe.sources()}
    for arm in recipe.arms:
        runs = found[arm.name]
        if runs:
            needs = {} if arm.scratch else table["sources"][arm.source]["seeds"]
            row = arm_numbers(runs, found[recipe.scratch_name(arm)], needs, arm.scratch)
            row |= {"source": None if arm.scratch else arm.source, "linear": arm.linear is not None}
            table["arms"][arm.name] = row | {
                "against": None if arm.scratch else recipe.scratch_name(arm)
            }
    return table


def load_finished_runs(
    out: Path, name: str, seeds: Sequence[int]
) -> dict[int, tuple[dict[str, Any], Curve]]:
    """(facts, curve) of an arm's finished runs by seed."""
    folders = {seed: arms.arm_folder(out, name, seed) for seed in seeds}
    facts = {seed: read_json_if_exists(folder / arms.DONE) for seed, folder in folders.items()}
    return {
        seed: (fact, read_curve(folders[seed], fact))
        for seed, fact in facts.items()
        if fact is not None
    }


def source_numbers(recipe: Comparison, out: Path, name: str) -> dict[str, Any]:
    """What pretraining a source cost and gave, by seed; a model that was given cost nothing that is known."""
    seeds = {}
    for seed in recipe.seeds:
        folder = arms.source_folder(recipe, out, name, seed)
        known = (
            None
            if isinstance(recipe.sources()[name], str)
            else read_json_if_exists(folder / arms.DONE)
        )
        if known is not None:
            totals = {key: known["ledger"][key] for key in AXES}
            seeds[seed] = totals | {"loss": read_curve(folder, known).loss[-1]}
    return {"pretrained_here": isinstance(recipe.sources()[name], dict), "seeds": seeds}


def arm_numbers(
    runs: Mapping[int, tuple[dict[str, Any], Curve]],
    scratch: Mapping[int, tuple[dict[str, Any], Curve]],
    sources: Mapping[int, Mapping[str, float]],
    is_scratch: bool,
) -> dict[str, Any]:
    """One arm's row: means and spreads over seeds, the mean curve's savings, and every seed."""
    curves = {seed: curve for seed, (_, curve) in runs.items()}
    seeds: dict[str, Any] = {}
    for seed, curve in curves.items():
        start = runs[seed][0]["start"]
        row = {
            "start_loss": curve.loss[0],
            "loss": curve.loss[-1],
            "accuracy": curve.accuracy[-1],
            "fitting": start,
        }
        row |= {"flops": curve.flops[-1], "seconds": curve.seconds[-1], "tokens": curve.tokens[-1]}
        row |= {"kl": curve.kl[-1] if curve.kl else None, "curve": curve.json()}
        unfrozen = [
            entry["unfrozen"] for entry in runs[seed][0]["ledger"]["stages"] if "unfrozen" in entry
        ]
        row["unfrozen"] = unfrozen[0] if unfrozen else None
        if seed in scratch:
            reference = curve if is_scratch else scratch[seed][1]
            row |= compute_savings(curve, reference, sources.get(seed, arms.NO_COST))
        seeds[str(seed)] = row
    mean = mean_curve(list(curves.values()))
    both = [seed for seed in curves if seed in scratch]
    row = {
        "parameters": next(iter(runs.values()))[0]["parameters"],
        "curve": mean.json(),
        "seeds": seeds,
    }
    for key in ("start_loss", "loss", "accuracy", "kl", "unfrozen", *AXES):
        row[key] = mean_and_std([one[key] for one in seeds.values()])
    if both:
        own = mean_curve([curves[seed] for seed in both])
        reference = own if is_scratch else mean_curve([scratch[seed][1] for seed in both])
        cost = {
            axis: statistics.fmean(sources.get(seed, arms.NO_COST)[axis] for seed in both)
            for axis in AXES
        }
        row["savings"] = compute_savings(own, reference, cost)
        row["savings_over_seeds"] = {
            key: mean_and_std([seeds[str(seed)][key] for seed in both]) for key in row["savings"]
        }
    return row
