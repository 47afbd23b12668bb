"""Fit LiGO's maps: train the grown model for a few steps in which only the maps learn.

The maps are in `growth/ligo_maps.py`; docs/concepts/ligo.md explains them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .. import distributed, modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..data.packing import shuffled_indices
from ..data.text import Text
from ..errors import RegraftError
from ..growth.ligo_options import Ligo
from ..growth.sizes_to_steps import Growth
from ..growth.steps.ligo import Learned
from ..progress import Ticker
from .ligo_trainer import FitRow, LigoTrainer
from .loop import reduce_step_status
from .objectives import Data, Kind
from .output import lock_run, open_run
from .resume import RunState, describe_newest, load_state, save_state
from .session import load_stage_rows
from .signals import StopSignals
from .stage import Stage

KIND = "LiGO fitting"  # of the folder that holds the maps on their way
NO_STEPS = '{"steps": 0}'  # the options that leave the maps at their start


@dataclass(frozen=True)
class FitOptions:
    """Options of `--fit` that are not the maps' own (`growth.ligo_options.Ligo`)."""

    batch: int = 16  # rows a step, over all processes
    length: int = 256  # tokens a row
    micro: int | None = None  # rows that go through the model at a time; None for all
    precision: Literal["float32", "bfloat16", "auto"] = "float32"


# Called with (steps done, all steps, the last step's row).
Progress = Callable[[int, int, FitRow], None]


def fit_maps(
    source: Checkpoint,
    growth: Growth,
    method: Ligo,
    stage: Stage,
    rows: Data,
    seed: int = 0,
    micro: int | None = None,
    progress: Progress = lambda step, steps, row: None,
    out: Path | None = None,
    save_seconds: float = 60.0,
) -> Learned:
    """Learn how to grow `source` to the sizes of `growth` (LiGO, arXiv 2303.00980).

    With `out`, a call with the same arguments resumes after a kill, with the losses that it would
    have had: bit for bit with as many processes.

    RegraftError when nothing grows, when the data is of another kind than the objective, when a
    loss is not finite, and when `out` holds another fitting.

    Args:
        source: the checkpoint to grow.
        growth: the target sizes.
        method: the maps, the number of steps and the learning rates.
        stage: gives the objective (next, mask or image), the rows of a step and the precision.
        rows: the data.
        seed: of the maps' start, the rows' order and the masks.
        micro: rows that go through the model at a time, None for all. The grown weights are made
            once a step in any case.
        progress: called after each step.
        out: folder for the maps, their moments and the cost; None to store nothing.
        save_seconds: seconds between two checkpoints. There is also one at the end.

    Returns:
        The step that grows the source by the learned maps; its `cost` is a `FitCost`.
    """
    # Another class of the same model, or one with a head of its own, is then what grows.
    for step in growth.first_steps(source):
        source = step(source)
    sizes = growth.with_target_sizes(source).sizes
    check_fit(source, sizes, stage)
    learned = Learned(**sizes, method=method, seed=seed)
    grower = learned.build_grower(source)
    trainer = LigoTrainer(learned(source), grower.cache_source(), method)
    count = stage.batch * method.steps
    order = shuffled_indices(len(rows), count, seed) if count else torch.empty(0, dtype=torch.long)

    settings: dict[str, Any] = {"sizes": sizes, "method": asdict(method), "stage": asdict(stage)}
    settings |= {"seed": seed, "micro": micro}
    if out:
        settings["inputs"] = distributed.on_rank0(
            lambda: {
                "source": {"model": lineage.fingerprint(source, 0)},
                "data": {"rows": rows.digest},
            }
        )

    with _own_folder(out) as stopping:
        state = load_state(out, grower, settings) if out else RunState()
        trainer.restore(state)
        saved = time.monotonic()
        while state.step < method.steps:
            batch = rows[order[state.step * stage.batch : (state.step + 1) * stage.batch]]
            row = trainer.step(stage, batch, state.step, seed, micro or 0)
            state.step += 1
            progress(state.step, method.steps, row)
            if not (out and stopping):
                continue

            # All processes must decide alike whether to save and whether to stop.
            last = state.step == method.steps
            due = time.monotonic() - saved > save_seconds
            _, stop, due = reduce_step_status(0.0, stopping.is_requested, due)
            if due or stop or last:
                trainer.record(state)
                save_state(out, grower, trainer.optimizer, state, settings)
                saved = time.monotonic()
            if stop and not last:
                stopping.exit_process(describe_newest(out))

    maps = {name: value.detach().clone() for name, value in grower.state_dict().items()}
    return replace(learned, maps=maps, cost=cast(Mapping[str, float], trainer.cost))


@contextmanager
def _own_folder(out: Path | None) -> Iterator[StopSignals | None]:
    """Inside, this process alone writes in `out`, and what is returned notes signals."""
    if out is None:
        yield None
        return
    with (
        StopSignals() as stopping,
        open_run(out, KIND, lambda: {"verb": "fit"}, ()),
        lock_run(out),
    ):
        yield stopping


def check_fit(source: Checkpoint, sizes: Mapping[str, int | None], stage: Stage) -> None:
    """RegraftError when no size grows, or a batch does not split over the processes."""
    if all(size is None for size in sizes.values()):
        raise RegraftError(
            f"nothing to grow in '{source.origin}': give sizes to LiGO, such as hidden or layers"
        )
    if stage.batch % distributed.world_size():
        raise RegraftError(
            f"a batch of {stage.batch} does not split over {distributed.world_size()} processes: "
            "give a multiple as batch"
        )


def fit_from_options(
    source: Checkpoint,
    growth: Growth,
    data: Text | None,
    options: Mapping[str, Any],
    ticker: Ticker,
    out: Path | None = None,
    scratch: Path | None = None,
    trust_remote_code: bool = False,
) -> Learned:
    """`fit_maps` for the command line.

    RegraftError for an unknown option, and when steps are asked for without data.

    Args:
        source: the checkpoint to grow.
        growth: the target sizes.
        data: text, or a .npz file of images; None with `steps` 0.
        options: fields of `Ligo` and of `FitOptions`.
        ticker: shows the progress.
        out: see `fit_maps`.
        scratch: folder for the text's tokens, which the caller removes; None for a temporary one.
        trust_remote_code: whether code of the tokenizer may be run.
    """
    own = {field.name for field in fields(FitOptions)}
    known = own | {field.name for field in fields(Ligo)}
    if unknown := sorted(set(options) - known):
        raise RegraftError(f"unknown --fit '{unknown[0]}': use {', '.join(sorted(known))}")
    method = growth.ligo_options(
        **{name: value for name, value in options.items() if name not in own}
    )
    run = FitOptions(**{name: value for name, value in options.items() if name in own})

    if data is None and method.steps:
        raise RegraftError(
            f"--width-init ligo learns from text or images: give --data PATH, or --fit '{NO_STEPS}'"
        )
    if data is None:
        (learned,) = (step for step in growth.steps(source) if isinstance(step, Learned))
        return replace(learned, method=method)

    stage = choose_stage(source, run)
    ticker.start("reading data")
    tokenizer = None
    if stage.kind != "image":
        tokenizer = modeling.load_tokenizer(source.path, trust_remote_code)
    # `stage` is one step; as many rows are read as all steps need.
    whole = replace(stage, tokens=stage.tokens * max(method.steps, 1))
    rows = load_stage_rows(data, whole, tokenizer, scratch, ticker=ticker)(stage.length)

    def report_progress(step: int, steps: int, row: FitRow) -> None:
        overhead = f"weights cost {100 * row['overhead']:.2f} % of a step"
        ticker.update(step / steps, f"loss {row['loss']:.4f}, {overhead}")

    ticker.start("fitting LiGO's maps")
    return fit_maps(
        source, growth, method, stage, rows, growth.seed, run.micro, report_progress, out
    )


def choose_stage(source: Checkpoint, run: FitOptions) -> Stage:
    """A stage of one step with the objective that the source's family is made for."""
    anatomy = source.anatomy
    kind: Kind = "image" if anatomy.inputs == "pixels" else "next" if anatomy.causal else "mask"
    # Learned positions end somewhere: rows cannot be longer.
    length = min(int(run.length), source.sizes.get("pos", int(run.length)))
    return Stage(kind, run.batch * length, length, run.batch, precision=run.precision)
