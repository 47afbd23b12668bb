"""The training loop: stages in order, regular checkpoints, resume with the same losses."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed
from ..data.packing import shuffled_indices
from ..data.rows import Packed, Table
from . import optimizer_state, throughput
from .calibrate import rows_calibrated_together
from .distill import evaluate_kl
from .divergence import check_divergence
from .fsdp_forward import reshard_model, run_in_forward
from .gradient_checkpointing import set_gradient_checkpointing
from .layer_subset import apply_stage_layers, frozen_parameter_ids
from .ledger import sum_costs
from .lora import LoraWeights, attach_lora, detach_lora
from .metrics import HeldoutRow, StepResult, build_step_row, write_metrics_row
from .objectives import Data, Rows, check_rows, evaluate_objective
from .optimizer import (
    apply_gradients,
    build_optimizer,
    parameter_groups,
    projection_names,
    set_learning_rates,
    unfreeze,
)
from .precision import use_bfloat16
from .records import Cost, StepRow
from .resume import (
    RunState,
    describe_newest,
    list_checkpoints,
    load_state,
    lock_run,
    save_state,
)
from .run import Run, check_run
from .signals import StopSignals
from .stage import Stage
from .step import step_generator, train_step

__all__ = ["Run", "calibration_batches", "shuffled_indices", "train"]

MEASURED_STEPS = 3  # a stage with a time limit sets its length after these
FEW_STEPS = 20  # or after the first, where no more than these fit by what it took
REFITS = (1 / 4, 1 / 2, 3 / 4)  # shares of a stage at which it corrects its length


def train(run: Run) -> dict[str, Any]:
    """Train through every stage.

    Progress is kept in `out/run`: called again with the same arguments, training resumes at the
    last checkpoint, with the losses that the uninterrupted run would have had. They are the same
    bit for bit with as many processes, and within round-off with another number. Rows go to
    `out/metrics.jsonl`. SIGTERM, SIGHUP, SIGQUIT, Ctrl-C and a lost reader of the progress end the
    run with a checkpoint after the current step.

    RegraftError when `out/run` belongs to other settings, when a stage lacks its teacher, or when
    a loss is not finite or has jumped.

    Returns:
        The ledger: `stages`, one `LedgerEntry` each, and their sums `tokens`, `flops` (the
        teacher's forward included) and `seconds`. Callers add to it.
    """
    for stage in run.stages:
        check_run(run, stage)
    set_gradient_checkpointing(run.model, run.checkpointing)

    with StopSignals() as stopping, lock_run(run.out):
        state = load_state(run.out, run.model, run.settings)
        if distributed.is_rank0():
            # Rows of steps after the checkpoint will be written again.
            state.trim_metrics(run.out / "metrics.jsonl")
        for index in range(state.stage, len(run.stages)):
            StageTrainer(run, state, index, stopping).train()
    return {"stages": state.ledger, **sum_costs(state.ledger)}


class StepStatus(NamedTuple):
    """What all processes agree on after a step."""

    loss: float  # mean over the batch of all processes
    stop: bool  # some process was asked to stop
    save_due: bool  # the first process's time to the next checkpoint is over


class StageTrainer:
    """One stage of a run, from where `state` says to a checkpoint that starts the next stage."""

    def __init__(self, run: Run, state: RunState, index: int, stopping: StopSignals):
        """Set up the optimiser and everything else that the stage's steps need.

        Args:
            run: what the run was given.
            state: how far it has come; kept up to date.
            index: number of the stage, from 0.
            stopping: tells whether the process was asked to stop.
        """
        self.run, self.state, self.index, self.stopping = run, state, index, stopping
        self.stage = run.stages[index]
        self.rows = self._read_rows()
        if state.tokens:  # a time limit has shortened the stage before the run was resumed
            self.stage = dataclasses.replace(self.stage, tokens=state.tokens)
        elif run.limit(index) is not None:
            # Until the length is known: a rise over the planned steps may be longer than the stage.
            share = (MEASURED_STEPS + 1) / self.stage.steps
            self.stage = dataclasses.replace(self.stage, warmup=min(self.stage.warmup, share))

        # A resumed stage must not measure again: it would end in the other precision.
        if state.fast is None:
            state.fast = use_bfloat16(self.stage, run.device)
        self.fast = state.fast

        # Low-rank additions come first, as they are parameters that the optimiser must know.
        self.lora = self._attach_lora()
        self.optimizer = self._build_optimizer()
        self.order = self._draw_order()
        self.peak_flops = throughput.measure_peak_flops(run.device, self.fast)
        self.entry = state.ledger_entry(index, self.stage.kind, self.fast)

        self.first = state.step  # steps that earlier runs have done
        # What steps take is measured from here on.
        self.saved = self.timed_from = time.monotonic()
        self.timed_step = state.step

    def _read_rows(self) -> Data:
        """The training rows; RegraftError when these or the held-out ones do not fit the model."""
        rows = self.run.rows(self.stage.length)
        for data in (rows, self.run.heldout or rows):
            check_rows(self.run.model, self.stage.objective, data)
        return rows

    def _attach_lora(self) -> LoraWeights | None:
        """Low-rank additions for a stage with a rank, None for others."""
        names = projection_names(self.run.model) if self.stage.rank else []
        if not names:
            return None
        seed = self.run.seed + self.index
        return attach_lora(self.run.model, names, self.stage.rank, seed, self.state.moments)

    def _build_optimizer(self) -> torch.optim.AdamW:
        """AdamW as it was when the stage was interrupted, or new."""
        run, state, stage = self.run, self.state, self.stage
        frozen = frozen_parameter_ids(run.model, stage.layers)
        optimizer = build_optimizer(parameter_groups(run.model, stage, frozen))
        # Moments are restored by parameter, so unfrozen parameters need their groups before that.
        if state.watch.unfrozen is not None:
            unfreeze(run.model, stage, optimizer, state.watch.unfrozen)
        state.restore_optimizer(run.model, optimizer)
        if run.moments is not None and self.index == state.step == 0:
            optimizer_state.load_optimizer_state(run.model, optimizer, run.moments)

        # Checkpoints hold only what some stage has changed. The projections under low-rank
        # additions get gradients after that: they are in no group of the optimiser.
        state.changed |= trainable_names(run.model)
        if self.lora is not None:
            state.changed |= self.lora.enable_gradients(list(self.lora.weights))
        return optimizer

    def _draw_order(self) -> Tensor:
        """Numbers of the rows in the order in which they are read, for all steps."""
        stage, seed = self.stage, self.run.seed + self.index
        return shuffled_indices(len(self.rows), stage.steps * stage.batch, seed)

    def train(self) -> None:
        """Run all steps that are left."""
        state = self.state
        if state.step == 0:
            self._evaluate()

        self.saved = self.timed_from = time.monotonic()
        while state.step < self.stage.steps:
            result, status = self._take_step()
            row = self._record_step(result)
            if state.step == self.first + 1:
                # The first step is slower (FLOPs are counted, memory is new): time the others.
                now = time.monotonic()
                self.first_seconds, self.timed_from = now - self.timed_from, now
                self.timed_step = state.step
            self.run.progress(self.stage, state.step, self.stage.steps, row)

            # The time limit may make this step the last one, which is always evaluated.
            self._apply_time_limit()
            if state.step == self.stage.steps or (
                self.run.every and state.step % self.run.every == 0
            ):
                self._evaluate()
            if (status.save_due or status.stop) and state.step < self.stage.steps:
                self._save_checkpoint(status.stop)
        self._finish()

    def _take_step(self) -> tuple[StepResult, StepStatus]:
        """One optimiser step: forward, backward, update."""
        run, state, stage = self.run, self.state, self.stage
        begin = time.monotonic()
        set_learning_rates(self.optimizer, stage, state.step)
        start = state.step * stage.batch
        batch: Rows = self.rows[self.order[start : start + stage.batch]]
        loss, flops = train_step(run, stage, self.index, state.step, batch, self.fast, state.costs)

        # The model computes with base + low-rank product: its gradients go to the factors for
        # the update, which then goes back into the model's weights.
        if self.lora is not None:
            self.lora.pull_gradients()
        norm = apply_gradients(self.optimizer, stage.clip)
        if self.lora is not None:
            self.lora.write_weights()

        state.step += 1
        save_due = time.monotonic() - self.saved > run.save_seconds
        status = reduce_step_status(loss, self.stopping.is_requested, save_due)
        seconds = time.monotonic() - begin
        return StepResult(status.loss, norm, batch.tokens, flops, seconds), status

    def _record_step(self, result: StepResult) -> StepRow:
        """Count a step in the ledger, stop a run that diverges, and write the metrics row."""
        run, state, stage, entry = self.run, self.state, self.stage, self.entry
        entry["tokens"] += result.tokens
        entry["flops"] += result.flops
        entry["flops_per_step"] = entry["flops"] // state.step
        entry["seconds"] += result.seconds

        # A run that stops here leaves no row, and no checkpoint, of this step.
        check_divergence(
            state.trend,
            run.spike,
            stage,
            (self.index, state.step),
            result.loss,
            result.grad_norm,
            lambda: list_checkpoints(run.out),
        )
        row = build_step_row(
            self.index, stage.kind, state.step, result, entry, self.optimizer, self.peak_flops
        )
        if stage.learn == "lit" and state.watch.observe(result.loss, stage.lit):
            row["unfrozen"] = entry["unfrozen"] = state.step
            self._unfreeze()
        write_metrics_row(run, row)
        return row

    def _unfreeze(self) -> None:
        """Everything learns from the next step on."""
        unfreeze(self.run.model, self.stage, self.optimizer, self.state.step)
        self.state.changed |= trainable_names(self.run.model)
        self.state.costs = {}  # backward passes now reach more weights: count their FLOPs anew

    def _apply_time_limit(self) -> None:
        """Give a stage with a time limit the steps that fit, once a few are measured.

        Machines slow down and speed up, so it is corrected on the way.
        """
        if not self._is_length_due():
            return
        state, limit = self.state, self.run.limit(self.index)
        if limit is None:
            return
        now = time.monotonic()
        steps = state.step - self.timed_step
        measured = (now - self.timed_from) / steps if steps else self.first_seconds
        # Processes measure different times, but must agree on the number of steps.
        left, per_step = distributed.broadcast((limit, measured))
        self.stage = fit_to_time(self.run.stages[self.index], state, left, per_step)
        self.order = self._draw_order()
        self.timed_from, self.timed_step = now, state.step

    def _is_length_due(self) -> bool:
        """Whether a stage with a time limit sets or corrects its length after this step."""
        done = self.state.step - self.first
        if not self.state.tokens:
            limit = self.run.limit(self.index) if done == 1 else None
            few = limit is not None and self.first_seconds * FEW_STEPS > limit
            return done == MEASURED_STEPS or (done == 1 and bool(distributed.broadcast(few)))
        marks = {int(share * self.stage.steps) for share in REFITS}
        return self.state.step in marks and self.state.step - self.timed_step >= MEASURED_STEPS

    def _evaluate(self) -> None:
        evaluate_heldout(self.run, self.stage, self.index, self.state.step, self.entry)

    def _save_checkpoint(self, stop: bool) -> None:
        """Write a checkpoint; ends the process when it was asked to stop."""
        run, state = self.run, self.state
        # While the loss is too high, the last checkpoint is the better place to resume from.
        if not state.trend.is_suspect:
            save_state(run.out, run.model, self.optimizer, state, run.settings)
        if stop:
            self.stopping.exit_process(describe_newest(run.out))
        self.saved = time.monotonic()

    def _finish(self) -> None:
        """Leave the model as the next stage, or the caller, needs it, with a checkpoint."""
        run, state = self.run, self.state
        if run.keep_moments and self.index == len(run.stages) - 1:
            optimizer_state.save_optimizer_state(run.model, self.optimizer, run.out)
        if self.lora is not None:
            state.changed -= detach_lora(run.model)
        state.advance_stage()
        save_state(run.out, run.model, None, state, run.settings)


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def reduce_step_status(loss: float, stop: bool, save_due: bool) -> StepStatus:
    """What all processes agree on, in one exchange.

    Args:
        loss: this process's part of the batch's mean loss; the parts are added up.
        stop: whether this process was asked to stop.
        save_due: whether a checkpoint is due by this process's clock; the first one's counts.
    """
    if distributed.world_size() == 1:
        return StepStatus(loss, stop, save_due)
    sums = torch.tensor([loss, stop, save_due and distributed.is_rank0()], dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return StepStatus(float(sums[0]), bool(sums[1]), bool(sums[2]))


def evaluate_heldout(run: Run, stage: Stage, index: int, step: int, spent: Cost) -> None:
    """Write a row of metrics.jsonl on the held-out rows, if there are any.

    It holds loss, accuracy, and the KL to the teacher of text for the next token.
    """
    if run.heldout is None:
        return
    model, teacher, heldout = run.model, run.teacher, run.heldout.to(run.device)

    # The stage's own layers run, but nothing is left out at random.
    no_drops = dataclasses.replace(stage, layer_drop=0.0, token_drop=0.0, window_drop=0.0)
    kl: float | None = None
    with apply_stage_layers(model, no_drops, step, step_generator(run.seed, index, step)):
        scores = run_in_forward(model, lambda: evaluate_objective(model, stage.objective, heldout))
        if teacher is not None and isinstance(heldout, Packed) and stage.objective == "next":
            kl = run_in_forward(model, lambda: evaluate_kl(model, teacher, heldout))
    reshard_model(model)  # no backward pass has done it

    row: HeldoutRow = {
        "stage": index,
        "step": step,
        "tokens": spent["tokens"],
        "flops": spent["flops"],
        "seconds": round(spent["seconds"], 3),
        "eval_loss": scores["loss"],
        "eval_accuracy": scores["accuracy"],
    }
    if kl is not None:
        row["eval_kl"] = kl
    write_metrics_row(run, row)


def fit_to_time(stage: Stage, state: RunState, left: float, per_step: float) -> Stage:
    """The stage with as many steps as fit into `left` seconds, at `per_step` seconds each.

    It keeps at least the steps that are done and has at most those of its budget.
    """
    steps = min(stage.steps, max(state.step, state.step + int(left / per_step)))
    state.tokens = steps * stage.length * stage.batch
    return dataclasses.replace(stage, tokens=state.tokens)


def calibration_batches(
    rows: Table, count: int, seed: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """`count` random rows as calibration batches: one row each, several where rows are short.

    Returns:
        (input_ids, position_ids, segments or None) of each, all (batch, time).
    """
    order = shuffled_indices(len(rows), min(count, len(rows)), seed)
    picked = [rows[some] for some in order.split(rows_calibrated_together(rows.length))]
    return [(batch.input_ids, batch.position_ids, batch.segments()) for batch in picked]
