"""One training step: this process's share of a batch, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import distributed
from ..data.rows import Packed
from ..modeling.flops import build_flop_counter
from .align import align_step, matrix_step, teacher_cost_key
from .distill import distil_step
from .fsdp_forward import run_in_forward
from .layer_subset import apply_stage_layers, find_protected_tokens
from .objectives import IGNORED, Rows, build_targets, compute_loss_on_targets
from .run import Run
from .stage import Stage


@dataclass(frozen=True)
class MicroBatchWeight:
    """What the mean loss of a micro-batch weighs in that of its batch.

    Both weights are multiplied by the number of processes, as gradients are averaged over these.
    """

    rows: float  # for means over rows: its share of the rows
    labels: float  # for means over labels: its share of what is to be guessed


def step_generator(seed: int, stage: int, step: int, use: int = 0) -> torch.Generator:
    """Random numbers of one step, the same whenever and wherever it is run.

    Args:
        seed: the run's.
        stage: number of the stage.
        step: number of the step.
        use: 0 for masks, 1 for drops.
    """
    mixed = ((seed * 1_000_003 + stage) * 1_000_003 + step) * 2 + use
    return torch.Generator().manual_seed(mixed % 2**63)


def micro_batches(rows: int, micro: int) -> Iterator[slice]:
    """This process's rows of a batch of `rows`, `micro` at a time (0: all of them)."""
    share = rows // distributed.world_size()
    begin, size = distributed.rank() * share, micro or share
    end = begin + share
    return (slice(at, min(at + size, end)) for at in range(begin, end, size))


def train_step(
    run: Run, stage: Stage, index: int, step: int, rows: Rows, fast: bool, costs: dict[str, int]
) -> tuple[float, int]:
    """Backpropagate the mean loss of a batch; gradients are left in the model.

    Args:
        run: the run.
        stage: number `index` of its stages.
        index: from 0.
        step: number of the step, from 0.
        rows: the whole batch, in every process; each takes its share.
        fast: bfloat16 autocast.
        costs: FLOPs of micro-batches by what ran in them. The first of each kind runs under the
            FLOP counter, which is slow, and is added here.

    Returns:
        (this process's part of the batch's mean loss, FLOPs of all processes).
    """
    # Targets are drawn for the whole batch, so that its split does not change them.
    labels: Tensor | None = None
    if uses_labels(stage) or stage.ce:
        generator = step_generator(run.seed, index, step)
        rows, labels = build_targets(run.model, stage.objective, rows, generator, stage.mask_share)
    protected = find_protected_tokens(rows, labels) if stage.token_drop else None
    label_count = 1 if labels is None else count_labels(labels)

    loss, flops = 0.0, 0
    for piece in micro_batches(len(rows), run.micro):
        micro = rows[piece].to(run.device)
        targets = None if labels is None else labels[piece].to(run.device)
        weight = weigh_micro_batch(len(micro), len(rows), targets, label_count)

        # Every micro-batch draws the same drops: a fresh generator with the same seed.
        drops = step_generator(run.seed, index, step, 1)
        with apply_stage_layers(run.model, stage, step, drops, protected, piece) as layers_key:
            cached = teacher_cost_key(run.model, run.teacher, stage.kind, micro, fast)
            key = f"{len(micro)} rows, {layers_key}{cached}"
            if key in costs:
                loss += backward_micro_batch(run, stage, micro, targets, fast, weight)
            else:
                with build_flop_counter() as counter:
                    loss += backward_micro_batch(run, stage, micro, targets, fast, weight)
                costs[key] = counter.get_total_flops()
        flops += distributed.world_size() * costs[key]
    return loss / distributed.world_size(), flops


def uses_labels(stage: Stage) -> bool:
    """Whether the stage's loss compares with labels rather than with a teacher."""
    return stage.kind in ("next", "mask", "image")


def count_labels(labels: Tensor) -> int:
    """How many of the labels are to be guessed."""
    return int((labels != IGNORED).sum())


def weigh_micro_batch(
    rows: int, batch_rows: int, labels: Tensor | None, batch_labels: int
) -> MicroBatchWeight:
    """The weight of `rows` of a batch of `batch_rows`, with `labels` of its `batch_labels`."""
    processes = distributed.world_size()
    row_share = processes * rows / batch_rows
    if labels is None:
        return MicroBatchWeight(row_share, row_share)
    return MicroBatchWeight(row_share, processes * count_labels(labels) / batch_labels)


def backward_micro_batch(
    run: Run, stage: Stage, rows: Rows, labels: Tensor | None, fast: bool, weight: MicroBatchWeight
) -> float:
    """Backpropagate the weighted loss of a micro-batch; returns it."""
    if uses_labels(stage):
        assert labels is not None
        loss = weight.labels * run_in_forward(
            run.model,
            lambda: compute_loss_on_targets(run.model, stage.objective, rows, labels, fast),
        )
        loss.backward()
        return float(loss.detach())

    # What is left learns from a teacher, which `check_run` has asked for.
    assert run.teacher is not None and isinstance(rows, Packed)
    if stage.kind == "distil":
        shares = (weight.rows, weight.labels)
        return distil_step(run.model, run.teacher, rows, fast, stage.ce, labels, shares)
    match = align_step if stage.kind == "align" else matrix_step
    return match(run.model, run.teacher, list(run.teacher_slots), rows, fast, weight.rows)
