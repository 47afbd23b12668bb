"""One training run of a comparison: a source or an arm with one seed, up to its done.json."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from .. import distributed
from ..core.moments import FILE as MOMENTS_FILE
from ..io.files import write_json
from ..train import fsdp, loop, objectives
from ..train.output import WORK
from ..train.stage import LAYERWISE, Stage
from . import data
from .folders import DONE, arm_folder, source_folder
from .numbers import DoneArm, DoneFacts, HeldOut, Ledger
from .recipe import Comparison
from .start import ReportProgress, Teacher, initialize_arm


def pretrain(
    recipe: Comparison, out: Path, name: str, seed: int, report_progress: ReportProgress
) -> None:
    """Train a source from its config; its folder then holds model, tokenizer and Adam's state.

    Args:
        recipe: the comparison.
        out: its folder.
        name: of the source.
        seed: of its weights and the order of the data.
        report_progress: called after every step.
    """
    folder, config = source_folder(recipe, out, name, seed), recipe.sources()[name]
    assert isinstance(config, dict)  # a source that is a directory needs no pretraining
    model = data.make_source(recipe, config, out, seed)
    stages = [recipe.stage(recipe.pretrain)]
    ledger = train_model(
        recipe, out, model, stages, folder, seed, report_progress, keep_moments=True
    )

    # Every process takes part in gathering; only the first one writes.
    weights = fsdp.gather_state_dict(model)

    def save() -> None:
        model.save_pretrained(folder, state_dict=weights)
        for file in (out / "tokenizer").glob("*"):
            shutil.copyfile(file, folder / file.name)

    distributed.on_rank0(save)
    finish_run(folder, {"config": config, "seed": seed, "ledger": ledger})


def train_arm(
    recipe: Comparison, out: Path, name: str, seed: int, report_progress: ReportProgress
) -> None:
    """Make the arm's model and train it on the comparison's budget; arguments as of `pretrain`."""
    arm, folder = recipe.arm(name), arm_folder(out, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(recipe, out, arm, seed)
    start = initialize_arm(recipe, out, arm, seed, teacher, report_progress)

    # Counted and measured here: training shards the model, and legs may train a part of it.
    parameters = sum(parameter.numel() for parameter in start.model.parameters())
    whole = evaluate_whole(recipe, out, start.model) if arm.legs else None

    ledger = train_model(
        recipe,
        out,
        start.model,
        recipe.stages(arm),
        folder,
        seed,
        report_progress,
        moments=start.moments,
        teacher=None if teacher is None else fsdp.shard_over_all(teacher.model),
        teacher_slots=() if teacher is None else teacher.slots,
    )
    finish_run(
        folder,
        {
            "arm": cast(DoneArm, dataclasses.asdict(arm)),
            "seed": seed,
            "parameters": parameters,
            "ledger": ledger,
            "start": start.cost,
            "whole": whole,
        },
    )


def evaluate_whole(recipe: Comparison, out: Path, model: PreTrainedModel) -> HeldOut:
    """A model on the held-out rows before it is trained."""
    rows = data.load_heldout_rows(recipe, out)
    measured = objectives.evaluate_objective(model, recipe.task, rows)
    return {"loss": measured["loss"], "accuracy": measured["accuracy"]}


def train_model(
    recipe: Comparison,
    out: Path,
    model: PreTrainedModel,
    stages: Sequence[Stage],
    folder: Path,
    seed: int,
    report_progress: ReportProgress,
    moments: Path | None = None,
    keep_moments: bool = False,
    teacher: PreTrainedModel | None = None,
    teacher_slots: Sequence[nn.Module] = (),
) -> Ledger:
    """The training loop with the comparison's data and evaluations; its ledger.

    Args:
        recipe: the comparison.
        out: its folder, which holds the data.
        model: what is trained, in place.
        stages: in order.
        folder: where the run keeps its checkpoints and metrics.
        seed: of order of rows, masks and drops.
        report_progress: called after every step.
        moments: file of Adam's state to begin with; None begins at zero.
        keep_moments: whether Adam's state is written at the end.
        teacher: of stages that imitate one.
        teacher_slots: its attention modules.
    """
    total = sum(stage.steps for stage in stages)
    # A stage that aligns layers runs each by itself, which takes another way of sharding.
    model = fsdp.shard_over_all(model, any(stage.kind in LAYERWISE for stage in stages))

    def progress(stage: Stage, step: int, steps: int, row: Mapping[str, Any]) -> None:
        done_before = sum(earlier.steps for earlier in stages[: row["stage"]])
        report_progress((done_before + step) / total)

    run = loop.Run(
        model,
        stages,
        data.load_training_rows(recipe, out),
        folder,
        seed=seed,
        progress=progress,
        heldout=data.load_heldout_rows(recipe, out),
        every=recipe.every,
        moments=moments,
        keep_moments=keep_moments,
        teacher=teacher,
        teacher_slots=teacher_slots,
    )
    return cast(Ledger, loop.train(run))


def finish_run(folder: Path, facts: DoneFacts) -> None:
    """Write done.json and delete what only a restart needs; the first process does."""
    if not distributed.is_rank0():
        return
    write_json(folder / DONE, facts)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    # A source keeps Adam's state: arms with `moments` begin with it.
    if "arm" in facts:
        (folder / MOMENTS_FILE).unlink(missing_ok=True)
