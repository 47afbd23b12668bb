"""One training step: this process's share of a batch, in pieces, weighted so that the split changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import distributed
from ..data.packing import Packed
from ..modeling.flops import build_flop_counter as counted
from .align import align_step, matrix_step, teacher_cost_key
from .fsdp_forward import run_in_forward
from .layer_subset import apply_stage_layers, find_protected_tokens
from .objectives import IGNORED, Rows, build_targets, compute_loss_on_targets
from .run import Run
from .stage import Stage, distil_step


@dataclass(frozen=True)
class MicroBatchWeight:
    """A piece of a batch in its mean: `rows`, its share of the rows, and `told`, of what has a label; both times the
    number of processes, over which gradients are averaged."""

    rows: float
    told: float


def step_generator(seed: int, stage: int, step: int, use: int = 0) -> torch.Generator:
    """Random numbers of one step, the same whenever it is run; `use`: 0 for masks, 1 for drops."""
    return torch.Generator().manual_seed(
        (((seed * 1_000_003 + stage) * 1_000_003 + step) * 2 + use) % 2**63
    )


def micro_batches(rows: int, micro: int) -> Iterator[slice]:
    """This process's rows of a batch, `micro` at a time (0: all of them)."""
    share = rows // distributed.world_size()
    begin, size = distributed.rank() * share, micro or share
    return (slice(at, min(at + size, begin + share)) for at in range(begin, begin + share, size))


def train_step(
    run: Run, stage: Stage, index: int, step: int, rows: Rows, fast: bool, costs: dict[str, int]
) -> tuple[float, int]:
    """(this process's part of the mean loss of all `rows`, backpropagated; FLOPs of all processes).

    The first piece of each cost is run under the counter.
    """
    labels: Tensor | None = None
    if stage.kind in ("next", "mask", "image") or stage.ce:
        seen = stage.kind if stage.kind in ("mask", "image") else "next"
        rows, labels = build_targets(
            run.model, seen, rows, step_generator(run.seed, index, step), stage.mask_share
        )
    held = find_protected_tokens(rows, labels) if stage.token_drop else None
    told = 1 if labels is None else int((labels != IGNORED).sum())
    total, flops = 0.0, 0
    for piece in micro_batches(len(rows), run.micro):
        mine, wanted = (
            rows[piece].to(run.device),
            None if labels is None else labels[piece].to(run.device),
        )
        share = distributed.world_size() * len(mine) / len(rows)
        weight = MicroBatchWeight(
            share,
            share
            if wanted is None
            else distributed.world_size() * int((wanted != IGNORED).sum()) / told,
        )
        with apply_stage_layers(
            run.model, stage, step, step_generator(run.seed, index, step, 1), held, piece
        ) as cost:
            cost = f"{len(mine)} rows, {cost}{teacher_cost_key(run.model, run.teacher, stage.kind, mine, fast)}"
            if cost in costs:
                total += backward_micro_batch(run, stage, mine, wanted, fast, weight)
            else:
                with counted() as counter:
                    total += backward_micro_batch(run, stage, mine, wanted, fast, weight)
                costs[cost] = counter.get_total_flops()
        flops += distributed.world_size() * costs[cost]
    return total / distributed.world_size(), flops


def backward_micro_batch(
    run: Run, stage: Stage, rows: Rows, labels: Tensor | None, fast: bool, weight: MicroBatchWeight
) -> float:
    """The weighted loss of a piece; gradients are left in the model."""
    if stage.kind in ("next", "mask", "image"):
        assert labels is not None
        value = weight.told * run_in_forward(
            run.model,
            lambda: compute_loss_on_targets(run.model, stage.objective, rows, labels, fast),
        )
        value.backward()
        return float(value.detach())
    assert run.teacher is not None and isinstance(rows, Packed)
    if stage.kind == "distil":
        return distil_step(
            run.model, run.teacher, rows, fast, stage.ce, labels, (weight.rows, weight.told)
        )
    match = align_step if stage.kind == "align" else matrix_step
    return match(run.model, run.teacher, list(run.teacher_slots), rows, fast, weight.rows)
