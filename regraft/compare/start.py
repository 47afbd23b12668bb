"""How an arm's model is made before it is trained: from scratch, grown, fitted or linearized."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..core.moments import FILE as MOMENTS_FILE
from ..data.images import Images
from ..data.packing import shuffled_indices
from ..errors import RegraftError
from ..growth import optimizer_state
from ..growth.sizes_to_steps import Growth
from ..growth.steps.ligo import Learned
from ..growth.steps.transplant import Transplant
from ..io.files import read_json_if_exists, write_json
from ..linearize import select_layers
from ..mixers.remix import Remix
from ..modeling import flops
from ..modeling.reopen import save_model
from ..train import fit_ligo, loop
from ..train.calibrate import calibrate
from . import data
from .folders import FITTING, GROWN, arm_folder, source_folder
from .numbers import NO_COST, ArmStartCost
from .recipe import MAIN, Arm, Comparison, LinearizeOptions, Operators

GROWTH_AXES = ("hidden", "ffn", "kv", "group", "dim", "depth")
SELECTION_TOKENS = 4096  # tokens on which a measured `keep` is chosen

ReportProgress = Callable[[float], None]
"""Gets the share of a run's work that is done, from 0 to 1."""
GrowthStep = Callable[[Checkpoint], Checkpoint]


@dataclass(frozen=True)
class Teacher:
    """The source of a linearized arm as it runs.

    Attributes:
        checkpoint: the source on disk.
        model: the same, loaded.
        slots: its attention modules by layer.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    slots: list[nn.Module]

    @classmethod
    def load(cls, recipe: Comparison, out: Path, arm: Arm, seed: int) -> Teacher | None:
        """The teacher of an arm; None for an arm that has none."""
        if arm.linear is None or arm.scratch:
            return None
        checkpoint = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
        model = modeling.load_stored(checkpoint)
        return cls(checkpoint, model, modeling.slots(model, checkpoint))


@dataclass(frozen=True)
class ArmStart:
    """An arm before training.

    Attributes:
        model: its model.
        cost: what making the model took.
        moments: file of its grown Adam state; None for a fresh one.
    """

    model: PreTrainedModel
    cost: ArmStartCost
    moments: Path | None = None


def initialize_arm(
    recipe: Comparison,
    out: Path,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    report_progress: ReportProgress,
) -> ArmStart:
    """Make an arm's model, the way that its kind says.

    Args:
        recipe: the comparison.
        out: its folder.
        arm: what is made.
        seed: of what is drawn.
        teacher: the source of a linearized arm; see `Teacher.load`.
        report_progress: called during the fitting of a `ligo` arm.
    """
    if arm.scratch:
        config = data.target_config(data.open_untrained_source(recipe, out, MAIN), recipe.target)
        return ArmStart(init_from_scratch(config, arm, seed), {**NO_COST})
    if arm.linear is not None and teacher is not None:
        return linearize_source(recipe, out, arm.linear, seed, teacher)

    source = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
    if arm.ligo is not None:
        return grow_with_ligo(recipe, out, arm, source, seed, report_progress)
    return grow_source(recipe, out, arm, source, seed)


def init_from_scratch(config: dict[str, Any], arm: Arm, seed: int) -> PreTrainedModel:
    """A random model of a stock config, with the arm's mixers if it has any.

    The random model is linearized like a source, but nothing of it is inherited: the mixers start
    as their own initialization has them.
    """
    model = modeling.build_random_model(config, seed)
    if arm.linear is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        remix = Remix.from_options(arm.linear, inherit="none", seed=seed)
        return modeling.materialize(remix(Checkpoint.open(folder)))


def linearize_source(
    recipe: Comparison, out: Path, linear: LinearizeOptions, seed: int, teacher: Teacher
) -> ArmStart:
    """The linearized source with its closed-form start, and what that took."""
    begin, length = time.monotonic(), recipe.train.length
    if not linear.calibration and select_layers.parse_keep(linear.keep) is None:
        model = modeling.materialize(Remix.from_options(linear, seed=seed)(teacher.checkpoint))
        seconds = time.monotonic() - begin
        return ArmStart(model, {**NO_COST, "seconds": seconds, "keep": linear.keep})

    # Rows are drawn twice with the same seed: to calibrate on, and to choose kept layers on.
    rows = data.load_training_rows(recipe, out)(length)
    assert not isinstance(rows, Images)  # verified: a linear arm's source is a decoder
    batches = []
    if linear.calibration:
        batches = loop.calibration_batches(rows, -(-linear.calibration // length), seed)

    with flops.build_flop_counter() as counter:
        count = min(len(rows), -(-SELECTION_TOKENS // length))
        windows = rows[shuffled_indices(len(rows), count, seed)]
        remix = select_layers.resolve_keep(
            teacher.checkpoint,
            Remix.from_options(linear, seed=seed),
            select_layers.SelectionData(windows, batches),
        )
        model = modeling.materialize(remix(teacher.checkpoint))
        if batches:
            for _ in calibrate(modeling.slots(model), teacher.model, teacher.slots, batches):
                pass

    cost: ArmStartCost = {
        "flops": counter.get_total_flops(),
        "tokens": sum(ids.numel() for ids, *_ in batches),
        "keep": remix.keep,
        "seconds": time.monotonic() - begin,
    }
    return ArmStart(model, cost)


def grow_source(recipe: Comparison, out: Path, arm: Arm, source: Checkpoint, seed: int) -> ArmStart:
    """The source after the arm's steps; with `moments`, its Adam state grown by the same steps."""
    begin = time.monotonic()
    steps = growth_steps(recipe, arm, source, seed)
    grown = source
    for step in steps:
        grown = step(grown)
    model = modeling.materialize(grown)

    moments = None
    if arm.moments:
        folder = arm_folder(out, arm.name, seed)
        old = source_folder(recipe, out, arm.source, seed) / MOMENTS_FILE
        distributed.on_rank0(
            lambda: optimizer_state.grow_optimizer_state(source, steps, old, folder / MOMENTS_FILE)
        )
        moments = folder / MOMENTS_FILE
    return ArmStart(model, {**NO_COST, "seconds": time.monotonic() - begin}, moments)


def growth_steps(recipe: Comparison, arm: Arm, source: Checkpoint, seed: int) -> list[GrowthStep]:
    """The steps of an arm; a fitted arm's with its map as it starts.

    They are enough to know the sizes of the arm's model, which is what `verify` needs. A rule that
    chooses kept layers by measuring cannot be followed there; it changes no size.
    """
    sizes = dataclasses.asdict(recipe.target)
    if arm.random:
        return [Transplant(**sizes, seed=seed)]
    if arm.ligo is not None:
        return [Learned(**sizes, method=arm.ligo, seed=seed)]
    if arm.linear is not None:
        measured = select_layers.parse_keep(arm.linear.keep) is not None and not arm.scratch
        changes = {"keep": "none"} if measured else {}
        return [Remix.from_options(arm.linear, seed=seed, **changes)]
    operators = dataclasses.asdict(arm.grow or Operators())
    return list(Growth(**sizes, **operators, seed=seed).steps(source))


def grow_with_ligo(
    recipe: Comparison,
    out: Path,
    arm: Arm,
    source: Checkpoint,
    seed: int,
    report_progress: ReportProgress,
) -> ArmStart:
    """The model that a fitted map gives, and what the fitting took.

    Both are kept in the arm's folder: a run that is killed while it trains does not fit again.
    """
    folder = arm_folder(out, arm.name, seed)
    if not distributed.on_rank0((folder / "start.json").exists):
        assert arm.ligo is not None
        growth = Growth(**dataclasses.asdict(recipe.target), seed=seed)
        stage = recipe.stages(arm)[-1]
        rows = data.load_training_rows(recipe, out)(stage.length)
        # The share stays 0: it counts training, but reporting sees whether the parent is alive.
        learned = fit_ligo.fit_maps(
            source,
            growth,
            arm.ligo,
            stage,
            rows,
            seed,
            progress=lambda *step: report_progress(0.0),
            out=folder / FITTING,
        )

        def save() -> None:
            save_model(learned(source), folder / GROWN, overwrite=True)
            write_json(folder / "start.json", NO_COST | dict(learned.cost))

        distributed.on_rank0(save)
    grown = Checkpoint.open(folder / GROWN)
    cost = read_json_if_exists(folder / "start.json", ArmStartCost)
    return ArmStart(modeling.load_stored(grown), cost)


def verify(recipe: Comparison, out: Path) -> None:
    """RegraftError when an arm cannot reach the target or a source does not do the task.

    Called before any training, on untrained sources.
    """
    main = data.open_untrained_source(recipe, out, MAIN)
    config = data.target_config(main, recipe.target)
    target = main.anatomy.solve(config)
    for arm in recipe.arms:
        source = data.open_untrained_source(recipe, out, MAIN if arm.scratch else arm.source)
        data.check_task(recipe, source)
        recipe.stages(arm)

        # Taking the steps refuses what cannot be made; a plain scratch arm takes none.
        grown = source
        if arm.linear or not arm.scratch:
            for step in growth_steps(recipe, arm, source, 0):
                grown = step(grown)

        # A scratch arm is built from the target's own config.
        sizes = target if arm.scratch else grown.sizes
        for axis in GROWTH_AXES:
            if target[axis] != sizes[axis]:
                raise RegraftError(
                    f"arm '{arm.name}' ends with {axis} {sizes[axis]}, the target has "
                    f"{target[axis]}: give the target all sizes in which its sources differ"
                )
