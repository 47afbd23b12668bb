"""Rows of metrics.jsonl: one for every optimiser step, one for every held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, cast

import torch

from .. import distributed
from ..io.files import append_json_line
from .records import Cost, StepRow
from .throughput import compute_throughput

FILE = "metrics.jsonl"


class HeldoutRow(Cost):
    """A row of metrics.jsonl for held-out rows. Costs are totals of the stage up to here."""

    stage: int  # from 0
    step: int  # steps done, 0 before the first
    eval_loss: float
    eval_accuracy: float  # share of targets that the likeliest guess hits
    eval_kl: NotRequired[float]  # KL(teacher || model) per token, with a teacher


MetricsRow = StepRow | HeldoutRow


class MetricsOutput(Protocol):
    """Where rows go: a `Run`, or a `LayerwiseRun`."""

    @property
    def out(self) -> Path:
        """The folder of metrics.jsonl."""

    @property
    def track(self) -> Callable[[Any], None]:
        """Gets every row once it is written."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gave and took, over all processes."""

    loss: float  # mean over the batch
    grad_norm: float  # before clipping
    tokens: int  # of the batch; images for image models
    flops: int
    seconds: float


def build_step_row(
    stage: int,
    kind: str,
    step: int,
    result: StepResult,
    totals: Cost,
    optimizer: torch.optim.Optimizer,
    peak_flops: float,
    layer: int | None = None,
) -> StepRow:
    """The row of a step that is done.

    Args:
        stage: number of the stage, from 0.
        kind: the stage's kind.
        step: number of the step, from 1.
        result: the step's own loss, norm and cost.
        totals: tokens, FLOPs and seconds so far, this step included.
        optimizer: gives the learning rate, the largest of all groups.
        peak_flops: FLOP/s of this machine, from `throughput.measure_peak_flops`.
        layer: for alignment layer by layer, the layer that was trained.
    """
    row: dict[str, Any] = {"stage": stage, "kind": kind}
    if layer is not None:
        row["layer"] = layer  # before the step, as people read these rows too
    row |= {
        "step": step,
        "tokens": totals["tokens"],
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "seconds": round(totals["seconds"], 3),
        "flops": totals["flops"],
    }

    speed = compute_throughput(result.tokens, result.flops, result.seconds, peak_flops)
    return cast(StepRow, row | {**speed})


def write_metrics_row(output: MetricsOutput, row: MetricsRow) -> None:
    """Append a row to metrics.jsonl and give it to the trackers; the first process does."""
    if not distributed.is_rank0():
        return
    append_json_line(output.out / FILE, row)
    output.track(row)
