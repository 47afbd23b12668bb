"""From the curves of all runs to numbers: losses, and what each arm saves against scratch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from ..errors import RegraftError, explain_errors
from ..io.files import read_json_if_exists, read_json_lines
from ..train.metrics import FILE, MetricsRow
from .folders import DONE, arm_folder, source_folder
from .numbers import (
    AXES,
    MEASURES,
    NO_COST,
    ArmMeasures,
    AverageCost,
    AxisName,
    ComparisonNumbers,
    CurveNumbers,
    DoneFacts,
    FailedRun,
    MeanStd,
    Savings,
    SeedNumbers,
    SourceNumbers,
    SourceSeed,
)
from .recipe import Comparison


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run in order, or the mean of several; all lists have the same length.

    Attributes:
        tokens: tokens (or images) so far, those of the start included.
        flops: floating-point operations so far.
        seconds: time of training steps so far.
        loss: on the held-out rows.
        accuracy: share of right first guesses on them.
        kl: to the source, in nats; empty for arms that do not have it as their teacher.
    """

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    accuracy: list[float]
    kl: list[float] = field(default_factory=list)

    def totals(self, axis: AxisName) -> list[float]:
        """What was spent until each evaluation."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}[axis]

    def json(self) -> CurveNumbers:
        """Plain lists."""
        return {
            "tokens": list(self.tokens),
            "flops": list(self.flops),
            "seconds": list(self.seconds),
            "loss": list(self.loss),
            "accuracy": list(self.accuracy),
            "kl": list(self.kl),
        }


class FinishedRun(NamedTuple):
    """A finished run of an arm: what it left in done.json, and its curve."""

    facts: DoneFacts
    curve: Curve


def read_done(folder: Path, kind: str) -> DoneFacts | None:
    """done.json of a run, None while it is not done; RegraftError when it is damaged.

    Args:
        folder: of the run.
        kind: `arm` or `source`.
    """
    facts: DoneFacts | None = read_json_if_exists(folder / DONE, DoneFacts)
    needed = ("arm", "parameters", "start") if kind == "arm" else ("config",)
    if facts is not None and (missing := [key for key in needed if key not in facts]):
        raise RegraftError(
            f"'{folder / DONE}' lacks the key '{missing[0]}': delete '{folder}' and run again"
        )
    return facts


def read_curve(folder: Path, facts: DoneFacts) -> Curve:
    """The curve of a finished run; what its start and earlier stages took is counted in.

    Only evaluations of the whole model are points: while a sub-model is trained, that is what
    metrics.jsonl has, and it is not what the arm ends with. RegraftError when none is left.

    Args:
        folder: where the run keeps metrics.jsonl.
        facts: its done.json.
    """
    start = facts.get("start", NO_COST)
    stages = facts["ledger"]["stages"]
    submodel_stages = find_submodel_stages(facts)

    # Points in the order of Curve's fields; kl is there in all of them or in none.
    points: list[list[float]] = []

    # The first stage's own evaluation at step 0 is of a sub-model; `train_arm` measured the whole.
    whole = facts.get("whole")
    if 0 in submodel_stages and whole is not None:
        points.append([*(start[axis] for axis in AXES), whole["loss"], whole["accuracy"]])

    for row in read_json_lines(folder / FILE, MetricsRow):
        stage = row["stage"]
        if "eval_loss" not in row or stage in submodel_stages:
            continue
        # Step 0 of a stage repeats the end of the stage before, unless that was a sub-model's.
        if row["step"] == 0 and stage > 0 and stage - 1 not in submodel_stages:
            continue

        # The counters of metrics.jsonl begin anew with every stage.
        totals = [
            sum(entry[axis] for entry in stages[:stage]) + row[axis] + start[axis] for axis in AXES
        ]
        measured = ("eval_loss", "eval_accuracy", "eval_kl")
        points.append([*totals, *(row[key] for key in measured if key in row)])

    if not points:
        raise RegraftError(
            f"{folder}/metrics.jsonl has no evaluation: delete {folder} and run the command again"
        )
    return Curve(*(list(column) for column in zip(*points, strict=True)))


def find_submodel_stages(facts: DoneFacts) -> set[int]:
    """Numbers of the stages that train a sub-model, the bottom layers alone."""
    legs = facts["arm"]["legs"] if "arm" in facts else []
    return {index for index, leg in enumerate(legs) if leg["layers"].startswith("bottom")}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, evaluation by evaluation."""
    names = list(vars(curves[0]))
    columns = (zip(*(getattr(curve, name) for curve in curves), strict=True) for name in names)
    return Curve(*([statistics.fmean(values) for values in column] for column in columns))


def find_crossing(totals: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The total at which a curve first has the target loss, linear between evaluations.

    None when it never has.

    Args:
        totals: what was spent until each evaluation.
        losses: the loss there.
        target: the loss to reach.
    """
    for index, loss in enumerate(losses):
        if loss > target:
            continue
        if index == 0:
            return totals[0]
        share = (losses[index - 1] - target) / (losses[index - 1] - loss)
        return totals[index - 1] + share * (totals[index] - totals[index - 1])
    return None


def compute_savings(curve: Curve, scratch: Curve, source: AverageCost) -> Savings:
    """What a curve saves against scratch until it has scratch's last loss.

    Args:
        curve: the arm's; scratch itself saves nothing, whatever its curve did before the end.
        scratch: what it is measured against.
        source: what pretraining the arm's source took.
    """
    # Where a source was given, or for scratch, nothing was pretrained and `source` is zero.
    savings: Savings = {}
    for axis in AXES:
        scratch_total = scratch.totals(axis)[-1]
        if curve is scratch:
            reached: float | None = scratch_total
        else:
            reached = find_crossing(curve.totals(axis), curve.loss, scratch.loss[-1])

        savings[f"{axis}_to_reach"] = reached
        savings[f"times_{axis}"] = scratch_total / reached if reached else None
        for suffix, pretraining in (("", 0.0), ("_with_source", source[axis])):
            saved = None if reached is None else scratch_total - reached - pretraining
            savings[f"saved_{axis}{suffix}"] = saved
            savings[f"saved_{axis}_share{suffix}"] = (
                None if saved is None else saved / scratch_total
            )
    return savings


def mean_and_std(values: Sequence[float | None]) -> MeanStd:
    """Mean and standard deviation of the values that are not None."""
    measured = [value for value in values if value is not None]
    if not measured:
        return {"mean": None, "std": None, "count": 0}
    return {
        "mean": statistics.fmean(measured),
        "std": statistics.stdev(measured) if len(measured) > 1 else 0.0,
        "count": len(measured),
    }


def summarise(recipe: Comparison, out: Path, failed: Sequence[FailedRun] = ()) -> ComparisonNumbers:
    """The numbers of a comparison from its finished runs.

    Args:
        recipe: what was compared.
        out: folder of the comparison.
        failed: runs that ended with an error.
    """
    # Files of runs that are as they should be one by one may still not belong together.
    with explain_errors(f"the runs in '{out}' do not add up", "delete the damaged one, run again"):
        return compute_numbers(recipe, out, failed)


def compute_numbers(
    recipe: Comparison, out: Path, failed: Sequence[FailedRun]
) -> ComparisonNumbers:
    """The numbers of `summarise`, from files that belong together."""
    numbers: ComparisonNumbers = {
        "task": recipe.task,
        "seeds": recipe.seeds,
        "arms": {},
        "step": recipe.stage(recipe.train).length * recipe.train.batch,
        "sources": {name: source_numbers(recipe, out, name) for name in recipe.sources()},
        "failed": list(failed),
    }

    # All runs first: an arm is measured against the runs of another one.
    runs = {arm.name: load_finished_runs(out, arm.name, recipe.seeds) for arm in recipe.arms}
    for arm in recipe.arms:
        if not runs[arm.name]:
            continue
        sources = {} if arm.scratch else numbers["sources"][arm.source]["seeds"]
        scratch = recipe.scratch_name(arm)
        numbers["arms"][arm.name] = {
            **arm_numbers(runs[arm.name], runs[scratch], sources, arm.scratch),
            "source": None if arm.scratch else arm.source,
            "linear": arm.linear is not None,
            "against": None if arm.scratch else scratch,
        }
    return numbers


def load_finished_runs(out: Path, name: str, seeds: Sequence[int]) -> dict[int, FinishedRun]:
    """The finished runs of an arm by seed."""
    runs = {}
    for seed in seeds:
        folder = arm_folder(out, name, seed)
        facts = read_done(folder, "arm")
        if facts is not None:
            runs[seed] = FinishedRun(facts, read_curve(folder, facts))
    return runs


def source_numbers(recipe: Comparison, out: Path, name: str) -> SourceNumbers:
    """What pretraining a source took and gave, by seed.

    A model that was given as a directory has no seeds: what it took is not known.
    """
    if not isinstance(recipe.sources()[name], dict):
        return {"pretrained_here": False, "seeds": {}}

    seeds: dict[int, SourceSeed] = {}
    for seed in recipe.seeds:
        folder = source_folder(recipe, out, name, seed)
        facts = read_done(folder, "source")
        if facts is not None:
            ledger = facts["ledger"]
            seeds[seed] = {
                "tokens": ledger["tokens"],
                "flops": ledger["flops"],
                "seconds": ledger["seconds"],
                "loss": read_curve(folder, facts).loss[-1],
            }
    return {"pretrained_here": True, "seeds": seeds}


def arm_numbers(
    runs: Mapping[int, FinishedRun],
    scratch: Mapping[int, FinishedRun],
    sources: Mapping[int, AverageCost],
    is_scratch: bool,
) -> ArmMeasures:
    """One arm's row: means and spreads over seeds, the mean curve's savings, and every seed.

    Args:
        runs: the arm's, by seed.
        scratch: those of the scratch arm that it is measured against.
        sources: what pretraining its source took, by seed; empty where it took nothing here.
        is_scratch: whether the arm is that scratch arm itself.
    """
    curves = {seed: run.curve for seed, run in runs.items()}
    measured = {str(seed): seed_numbers(run) for seed, run in runs.items()}
    numbers = cast(
        ArmMeasures,
        {
            "parameters": next(iter(runs.values())).facts["parameters"],
            "curve": mean_curve(list(curves.values())).json(),
            "seeds": measured,
        }
        | {key: mean_and_std([one[key] for one in measured.values()]) for key in MEASURES},
    )

    # Savings are those of means over the seeds that both have: other seeds have no counterpart.
    shared = [seed for seed in curves if seed in scratch]
    by_seed: dict[int, Savings] = {}
    for seed in shared:
        reference = curves[seed] if is_scratch else scratch[seed].curve
        by_seed[seed] = compute_savings(curves[seed], reference, sources.get(seed, NO_COST))
        measured[str(seed)] = cast(SeedNumbers, {**measured[str(seed)], **by_seed[seed]})
    if shared:
        own = mean_curve([curves[seed] for seed in shared])
        reference = own if is_scratch else mean_curve([scratch[seed].curve for seed in shared])
        savings = compute_savings(own, reference, mean_cost(sources, shared))
        numbers["savings"] = savings
        numbers["savings_over_seeds"] = {
            key: mean_and_std([by_seed[seed][key] for seed in shared]) for key in savings
        }
    return numbers


def seed_numbers(run: FinishedRun) -> SeedNumbers:
    """One run's row, without savings."""
    facts, curve = run
    unfrozen = [entry["unfrozen"] for entry in facts["ledger"]["stages"] if "unfrozen" in entry]
    return {
        "start_loss": curve.loss[0],
        "loss": curve.loss[-1],
        "accuracy": curve.accuracy[-1],
        "fitting": facts["start"],
        "flops": curve.flops[-1],
        "seconds": curve.seconds[-1],
        "tokens": curve.tokens[-1],
        "kl": curve.kl[-1] if curve.kl else None,
        "curve": curve.json(),
        "unfrozen": unfrozen[0] if unfrozen else None,
    }


def mean_cost(sources: Mapping[int, AverageCost], seeds: Sequence[int]) -> AverageCost:
    """What pretraining a source took, the mean over seeds."""
    costs = [sources.get(seed, NO_COST) for seed in seeds]
    return {
        "tokens": statistics.fmean(cost["tokens"] for cost in costs),
        "flops": statistics.fmean(cost["flops"] for cost in costs),
        "seconds": statistics.fmean(cost["seconds"] for cost in costs),
    }
