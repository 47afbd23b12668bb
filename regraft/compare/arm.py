"""One training run of a comparison: a source or an arm with one seed, begun, trained, and its last word kept."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.packing import Images, shuffled_indices
from ..errors import RegraftError
from ..growth import optimizer_state
from ..growth.sizes_to_steps import Growth
from ..growth.steps.ligo import Learned
from ..growth.steps.transplant import Transplant
from ..io.files import read_json_if_exists, write_json
from ..linearize import select_layers
from ..modeling import flops
from ..train import fit_ligo, fsdp, loop, objectives
from ..train.calibrate import calibrate
from ..train.stage import LAYERWISE, Stage
from . import data
from .recipe import MAIN, Arm, Comparison, LinearizeOptions

DONE, FITTING = "done.json", "fitting"
GROWTH_AXES = ("hidden", "ffn", "kv", "group", "dim", "depth")
SELECTION_TOKENS = 4096  # tokens on which a measured `keep` is chosen
NO_COST = {"flops": 0, "seconds": 0.0, "tokens": 0}
Tell = Callable[[float], None]


def source_folder(recipe: Comparison, out: Path, name: str, seed: int) -> Path:
    """Where a source is: its own directory when it was given as one."""
    source = recipe.sources()[name]
    return Path(source) if isinstance(source, str) else out / "sources" / name / str(seed)


def arm_folder(out: Path, name: str, seed: int) -> Path:
    """Where an arm's run with one seed is kept."""
    return out / "arms" / name / str(seed)


def pretrain(recipe: Comparison, out: Path, name: str, seed: int, tell: Tell) -> None:
    """Train a source from its config; its folder then is a model with its tokenizer and Adam's state."""
    folder, config = source_folder(recipe, out, name, seed), recipe.sources()[name]
    assert isinstance(config, dict)
    model = data.make_source(recipe, config, out, seed)
    ledger = train_model(
        recipe, out, model, [recipe.stage(recipe.pretrain)], folder, seed, tell, keep_moments=True
    )
    values = fsdp.gather_state_dict(model)

    def save() -> None:
        model.save_pretrained(folder, state_dict=values)
        for file in (out / "tokenizer").glob("*"):
            shutil.copyfile(file, folder / file.name)

    distributed.on_rank0(save)
    finish_run(folder, {"config": config, "seed": seed, "ledger": ledger})


def train_arm(recipe: Comparison, out: Path, name: str, seed: int, tell: Tell) -> None:
    """Make the arm's model and train it on the comparison's budget."""
    arm, folder = recipe.arm(name), arm_folder(out, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(recipe, out, arm, seed)
    model, spent, state = initialize_arm(recipe, out, arm, seed, teacher, tell)
    count = sum(parameter.numel() for parameter in model.parameters())
    whole = (
        objectives.evaluate_objective(model, recipe.task, data.load_heldout_rows(recipe, out))
        if arm.legs
        else None
    )
    guide = (
        {}
        if teacher is None
        else {"teacher": fsdp.shard_over_all(teacher.model), "teacher_slots": teacher.slots}
    )
    ledger = train_model(
        recipe, out, model, recipe.stages(arm), folder, seed, tell, moments=state, **guide
    )
    facts = {
        "arm": dataclasses.asdict(arm),
        "seed": seed,
        "parameters": count,
        "ledger": ledger,
        "start": spent,
    }
    facts |= {"whole": whole}
    finish_run(folder, facts)


def train_model(
    recipe: Comparison, out: Path, model: PreTrainedModel, stages: Sequence[Stage], folder: Path, seed: int, tell: Tell,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The training loop with the comparison's data and evaluations; the ledger."""
    total = sum(stage.steps for stage in stages)
    model = fsdp.shard_over_all(model, any(stage.kind in LAYERWISE for stage in stages))

    def progress(stage: Stage, step: int, steps: int, row: Mapping[str, Any]) -> None:
        before = sum(one.steps for one in stages[: row["stage"]])
        tell((before + step) / total)

    return loop.train(
        loop.Run(
            model, stages, data.load_training_rows(recipe, out), folder, seed=seed, progress=progress,
            heldout=data.load_heldout_rows(recipe, out), every=recipe.every, **options,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """The source of a linearized arm as it runs."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    slots: list[nn.Module]

    @classmethod
    def load(cls, recipe: Comparison, out: Path, arm: Arm, seed: int) -> Teacher | None:
        """None for an arm that has none."""
        if arm.linear is None or arm.scratch:
            return None
        checkpoint = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
        model = modeling.materialize(checkpoint)
        return cls(checkpoint, model, modeling.slots(model, checkpoint))


def initialize_arm(
    recipe: Comparison,
    out: Path,
    arm: Arm,
    seed: int,
    teacher: Teacher | None,
    tell: Tell = lambda share: None,
) -> tuple[PreTrainedModel, dict[str, Any], Path | None]:
    """(the arm's model before training, what making it cost, Adam's state or None)."""
    if arm.scratch:
        config = data.target_config(data.open_untrained_source(recipe, out, MAIN), recipe.target)
        return init_from_scratch(config, arm, seed), NO_COST, None
    if arm.linear is not None and teacher is not None:
        return *linearize_source(recipe, out, arm.linear, seed, teacher), None
    source = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
    if arm.ligo is not None:
        made, spent = grow_with_ligo(recipe, out, arm, source, seed, tell)
        return modeling.materialize(made), spent, None
    begin = time.monotonic()
    steps = growth_steps(recipe, arm, source, seed)
    grown = source
    for step in steps:
        grown = step(grown)
    model = modeling.materialize(grown)
    state = None
    if arm.moments:
        folder = arm_folder(out, arm.name, seed)
        begun_with = source_folder(recipe, out, arm.source, seed) / optimizer_state.FILE
        distributed.on_rank0(
            lambda: optimizer_state.grow_optimizer_state(source, steps, begun_with, folder)
        )
        state = folder / optimizer_state.FILE
    return model, NO_COST | {"seconds": time.monotonic() - begin}, state


def init_from_scratch(config: dict[str, Any], arm: Arm, seed: int) -> PreTrainedModel:
    """A new model of a stock config, with the arm's mixers if it has any, nothing of which is inherited."""
    model = modeling.build_random_model(config, seed)
    if arm.linear is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return modeling.materialize(
            arm.linear.remix(inherit="none", seed=seed)(Checkpoint.open(folder))
        )


def linearize_source(
    recipe: Comparison, out: Path, linear: LinearizeOptions, seed: int, teacher: Teacher
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(the linearized source with its closed-form start, what that cost)."""
    begin, length = time.monotonic(), recipe.train.length
    if not linear.calibration and select_layers.parse_keep(linear.keep) is None:
        model = modeling.materialize(linear.remix(seed=seed)(teacher.checkpoint))
        return model, NO_COST | {"seconds": time.monotonic() - begin, "keep": linear.keep}
    rows = data.load_training_rows(recipe, out)(length)
    assert not isinstance(rows, Images)  # verified: a linear arm's source is a decoder
    batches = (
        loop.calibration_batches(rows, -(-linear.calibration // length), seed)
        if linear.calibration
        else []
    )
    with flops.build_flop_counter() as counter:
        picked = rows[
            shuffled_indices(len(rows), min(len(rows), -(-SELECTION_TOKENS // length)), seed)
        ]
        remix = select_layers.resolve_keep(
            teacher.checkpoint,
            linear.remix(seed=seed),
            select_layers.SelectionData(picked, batches),
        )
        model = modeling.materialize(remix(teacher.checkpoint))
        if batches:
            for _ in calibrate(modeling.slots(model), teacher.model, teacher.slots, batches):
                pass
    spent = {
        "flops": counter.get_total_flops(),
        "tokens": len(batches) * length,
        "keep": remix.keep,
    }
    return model, spent | {"seconds": time.monotonic() - begin}


def growth_steps(recipe: Comparison, arm: Arm, source: Checkpoint, seed: int) -> list[Any]:
    """The steps of an arm; a fitted arm's with its map as it starts."""
    sizes = dataclasses.asdict(recipe.target)
    if arm.random:
        return [Transplant(**sizes, seed=seed)]
    if arm.ligo is not None:
        return [Learned(**sizes, method=arm.ligo, seed=seed)]
    if arm.linear is not None:
        measured = select_layers.parse_keep(arm.linear.keep) is not None and not arm.scratch
        return [arm.linear.remix(seed=seed, **({"keep": "none"} if measured else {}))]
    return list(arm.growth(recipe.target, seed).steps(source))


def grow_with_ligo(
    recipe: Comparison, out: Path, arm: Arm, source: Checkpoint, seed: int, tell: Tell
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that a fitted map gives, and what the fitting cost; both kept for a restart."""
    folder = arm_folder(out, arm.name, seed)
    if not distributed.on_rank0((folder / "start.json").exists):
        growth = Growth(**dataclasses.asdict(recipe.target), seed=seed)
        stage = recipe.stages(arm)[-1]
        assert arm.ligo is not None
        rows = data.load_training_rows(recipe, out)(stage.length)
        learned = fit_ligo.fit_maps(
            source,
            growth,
            arm.ligo,
            stage,
            rows,
            seed,
            progress=lambda *step: tell(0.0),
            out=folder / FITTING,
        )

        def save() -> None:
            learned(source).save(folder / "grown", overwrite=True)
            write_json(folder / "start.json", NO_COST | dict(learned.cost))

        distributed.on_rank0(save)
    return Checkpoint.open(folder / "grown"), read_json_if_exists(folder / "start.json")


def verify(recipe: Comparison, out: Path) -> None:
    """RegraftError before any training when an arm cannot reach the target or a source does not do the task."""
    main = data.open_untrained_source(recipe, out, MAIN)
    config = data.target_config(main, recipe.target)
    axes = main.anatomy.solve(config)
    for arm in recipe.arms:
        source = data.open_untrained_source(recipe, out, MAIN if arm.scratch else arm.source)
        data.check_task(recipe, source)
        recipe.stages(arm)
        grown = source
        for step in [] if arm.scratch and not arm.linear else growth_steps(recipe, arm, source, 0):
            grown = step(grown)
        sizes = axes if arm.scratch else grown.sizes
        if wrong := next((axis for axis in GROWTH_AXES if axes[axis] != sizes[axis]), None):
            raise RegraftError(
                f"arm '{arm.name}' ends with {wrong} {sizes[wrong]}, the target has {axes[wrong]}: give the target "
                "all sizes in which its sources differ"
            )


def finish_run(folder: Path, facts: dict[str, Any]) -> None:
    """Keep the last word of a run and delete what only a restart needs; the first process does."""
    if not distributed.is_rank0():
        return
    write_json(folder / DONE, facts)
    for name in ("run", "grown", FITTING):
        shutil.rmtree(folder / name, ignore_errors=True)
    if "arm" in facts:
        (folder / optimizer_state.FILE).unlink(missing_ok=True)
