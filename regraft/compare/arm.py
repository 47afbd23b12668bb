"""One training run of a comparison: a source or an arm with one seed, begun, trained, and its last word kept."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.packing import Images, shuffled
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
from .recipe import MAIN, Arm, Comparison, Linear

DONE, FITTING = "done.json", "fitting"
GROWS = ("hidden", "ffn", "kv", "group", "dim", "depth")
CHOOSE = 4096  # tokens on which a measured `keep` is chosen
FREE = {"flops": 0, "seconds": 0.0, "tokens": 0}
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
    ledger = train(recipe, out, model, [recipe.stage(recipe.pretrain)], folder, seed, tell, keep_moments=True)
    values = fsdp.gathered(model)

    def save() -> None:
        model.save_pretrained(folder, state_dict=values)
        for file in (out / "tokenizer").glob("*"):
            shutil.copyfile(file, folder / file.name)

    distributed.once(save)
    finish(folder, {"config": config, "seed": seed, "ledger": ledger})


def train_arm(recipe: Comparison, out: Path, name: str, seed: int, tell: Tell) -> None:
    """Make the arm's model and train it on the comparison's budget."""
    arm, folder = recipe.arm(name), arm_folder(out, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.of(recipe, out, arm, seed)
    model, spent, state = begun(recipe, out, arm, seed, teacher, tell)
    count = sum(parameter.numel() for parameter in model.parameters())
    whole = objectives.measured(model, recipe.task, data.heldout(recipe, out)) if arm.legs else None
    guide = {} if teacher is None else {"teacher": fsdp.over_all(teacher.model), "teacher_slots": teacher.slots}
    ledger = train(recipe, out, model, recipe.stages(arm), folder, seed, tell, moments=state, **guide)
    facts = {"arm": dataclasses.asdict(arm), "seed": seed, "parameters": count, "ledger": ledger, "start": spent}
    facts |= {"whole": whole}
    finish(folder, facts)


def train(
    recipe: Comparison, out: Path, model: PreTrainedModel, stages: Sequence[Stage], folder: Path, seed: int, tell: Tell,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The training loop with the comparison's data and evaluations; the ledger."""
    total = sum(stage.steps for stage in stages)
    model = fsdp.over_all(model, any(stage.kind in LAYERWISE for stage in stages))

    def progress(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        before = sum(one.steps for one in stages[: row["stage"]])
        tell((before + step) / total)

    return loop.train(
        loop.Run(
            model, stages, data.rows(recipe, out), folder, seed=seed, progress=progress,
            heldout=data.heldout(recipe, out), every=recipe.every, **options,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """The source of a linearized arm as it runs."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    slots: list[nn.Module]

    @classmethod
    def of(cls, recipe: Comparison, out: Path, arm: Arm, seed: int) -> Teacher | None:
        """None for an arm that has none."""
        if arm.linear is None or arm.scratch:
            return None
        checkpoint = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
        model = modeling.materialize(checkpoint)
        return cls(checkpoint, model, modeling.slots(model, checkpoint))


def begun(
    recipe: Comparison, out: Path, arm: Arm, seed: int, teacher: Teacher | None, tell: Tell = lambda share: None
) -> tuple[PreTrainedModel, dict[str, Any], Path | None]:
    """(the arm's model before training, what making it cost, Adam's state or None)."""
    if arm.scratch:
        config = data.target_config(data.blank(recipe, out, MAIN), recipe.target)
        return fresh(config, arm, seed), FREE, None
    if arm.linear is not None and teacher is not None:
        return *linearized(recipe, out, arm.linear, seed, teacher), None
    source = Checkpoint.open(source_folder(recipe, out, arm.source, seed))
    if arm.ligo is not None:
        made, spent = fitted(recipe, out, arm, source, seed, tell)
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
        distributed.once(lambda: optimizer_state.grow(source, steps, begun_with, folder))
        state = folder / optimizer_state.FILE
    return model, FREE | {"seconds": time.monotonic() - begin}, state


def fresh(config: dict[str, Any], arm: Arm, seed: int) -> PreTrainedModel:
    """A new model of a stock config, with the arm's mixers if it has any, nothing of which is inherited."""
    model = modeling.fresh(config, seed)
    if arm.linear is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return modeling.materialize(arm.linear.remix(inherit="none", seed=seed)(Checkpoint.open(folder)))


def linearized(
    recipe: Comparison, out: Path, linear: Linear, seed: int, teacher: Teacher
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(the linearized source with its closed-form start, what that cost)."""
    begin, length = time.monotonic(), recipe.train.length
    if not linear.calibration and select_layers.asked(linear.keep) is None:
        model = modeling.materialize(linear.remix(seed=seed)(teacher.checkpoint))
        return model, FREE | {"seconds": time.monotonic() - begin, "keep": linear.keep}
    rows = data.rows(recipe, out)(length)
    assert not isinstance(rows, Images)  # verified: a linear arm's source is a decoder
    batches = loop.batches(rows, -(-linear.calibration // length), seed) if linear.calibration else []
    with flops.counter() as counter:
        picked = rows[shuffled(len(rows), min(len(rows), -(-CHOOSE // length)), seed)]
        remix = select_layers.resolved(
            teacher.checkpoint, linear.remix(seed=seed), select_layers.Bench(picked, batches)
        )
        model = modeling.materialize(remix(teacher.checkpoint))
        if batches:
            for _ in calibrate(modeling.slots(model), teacher.model, teacher.slots, batches):
                pass
    spent = {"flops": counter.get_total_flops(), "tokens": len(batches) * length, "keep": remix.keep}
    return model, spent | {"seconds": time.monotonic() - begin}


def growth_steps(recipe: Comparison, arm: Arm, source: Checkpoint, seed: int) -> list[Any]:
    """The steps of an arm; a fitted arm's with its map as it starts."""
    sizes = dataclasses.asdict(recipe.target)
    if arm.random:
        return [Transplant(**sizes, seed=seed)]
    if arm.ligo is not None:
        return [Learned(**sizes, method=arm.ligo, seed=seed)]
    if arm.linear is not None:
        measured = select_layers.asked(arm.linear.keep) is not None and not arm.scratch
        return [arm.linear.remix(seed=seed, **({"keep": "none"} if measured else {}))]
    return list(arm.growth(recipe.target, seed).steps(source))


def fitted(
    recipe: Comparison, out: Path, arm: Arm, source: Checkpoint, seed: int, tell: Tell
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that a fitted map gives, and what the fitting cost; both kept for a restart."""
    folder = arm_folder(out, arm.name, seed)
    if not distributed.once((folder / "start.json").exists):
        growth = Growth(**dataclasses.asdict(recipe.target), seed=seed)
        stage = recipe.stages(arm)[-1]
        assert arm.ligo is not None
        rows = data.rows(recipe, out)(stage.length)
        learned = fit_ligo.fit(
            source, growth, arm.ligo, stage, rows, seed, progress=lambda *step: tell(0.0), out=folder / FITTING
        )

        def keep() -> None:
            learned(source).save(folder / "grown", overwrite=True)
            write_json(folder / "start.json", FREE | dict(learned.cost))

        distributed.once(keep)
    return Checkpoint.open(folder / "grown"), read_json_if_exists(folder / "start.json")


def verify(recipe: Comparison, out: Path) -> None:
    """RegraftError before any training when an arm cannot reach the target or a source does not do the task."""
    main = data.blank(recipe, out, MAIN)
    config = data.target_config(main, recipe.target)
    axes = main.anatomy.solve(config)
    for arm in recipe.arms:
        source = data.blank(recipe, out, MAIN if arm.scratch else arm.source)
        data.suits(recipe, source)
        recipe.stages(arm)
        grown = source
        for step in [] if arm.scratch and not arm.linear else growth_steps(recipe, arm, source, 0):
            grown = step(grown)
        sizes = axes if arm.scratch else grown.sizes
        if wrong := next((axis for axis in GROWS if axes[axis] != sizes[axis]), None):
            raise RegraftError(
                f"arm '{arm.name}' ends with {wrong} {sizes[wrong]}, the target has {axes[wrong]}: give the target "
                "all sizes in which its sources differ"
            )


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Keep the last word of a run and delete what only a restart needs; the first process does."""
    if not distributed.first():
        return
    write_json(folder / DONE, facts)
    for name in ("run", "grown", FITTING):
        shutil.rmtree(folder / name, ignore_errors=True)
    if "arm" in facts:
        (folder / optimizer_state.FILE).unlink(missing_ok=True)
