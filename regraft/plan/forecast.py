"""Training on machines that are not here: rows that fit on a GPU, speed, days and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NotRequired, TypedDict

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..io.units import parse_number
from ..modeling import flops
from .gpu_memory import largest_micro_batch, peak_memory
from .memory_model import StepMemory
from .training_request import GPUS, TrainingForecastRequest

if TYPE_CHECKING:
    from rich.console import Console

# Share of a GPU's memory for libraries, collectives, and what the allocator cannot use.
RESERVE = 0.1
MAX_GPUS_TRIED = 4096


class ThroughputForecast(TypedDict):
    """Speed of training, over all GPUs."""

    # Forward and backward of the student.
    student_flops_per_token: float
    # Forward of the teacher; 0 without one.
    teacher_flops_per_token: float
    # Forward again, with gradient checkpointing.
    again_flops_per_token: float
    # FLOP/s of one GPU by its datasheet.
    peak_flops_per_second: float
    # Of the peak that is assumed.
    share: float
    tokens_per_second: float


class BudgetForecast(TypedDict, total=False):
    """What a budget of tokens takes; empty when none is given."""

    tokens: int
    days: float
    gpu_hours: float
    # In the currency of the price; not there without a price.
    cost: float


class TrainingForecast(ThroughputForecast):
    """`train` in `regraft plan --train --json`."""

    stage: str
    gpus: int
    gpu: str
    precision: str
    checkpointing: bool
    # Tokens of a row.
    row_tokens: int
    # Of one GPU.
    memory_bytes: int
    # On each GPU at the worst moment; keys of `MemoryUse`.
    used: dict[str, int]
    # The sum of `used`.
    used_bytes: int
    # Rows that fit on one GPU at a time.
    largest_micro_batch: int
    # Rows on one GPU at a time.
    micro_batch: int
    # How many times in a step.
    accumulation: int
    # Rows of a step over all GPUs.
    batch: int
    # Weights that learn.
    learning: int
    tokens: NotRequired[int]
    days: NotRequired[float]
    gpu_hours: NotRequired[float]
    cost: NotRequired[float]


def forecast(
    source: Checkpoint, target: Checkpoint, request: TrainingForecastRequest
) -> TrainingForecast:
    """The forecast for training `target`; reads no weights.

    RegraftError when not even one row fits, with what would help, or when the stage does not suit
    the model.

    Args:
        source: what the target was made from; the teacher of `align` and `distil`.
        target: what is trained.
        request: the machines, the stage and the budget.
    """
    if not target.anatomy.host(target.config).causal:
        raise RegraftError(
            f"a {target.config['model_type']} does not predict the next token: "
            "plan a decoder's training"
        )
    if request.stage == "align" and not any(target.config.get("mixers") or []):
        raise RegraftError(
            f"stage '{request.stage}' fits mixers, and this plan has none: give --mixer or --method"
        )

    teacher = source if request.stage != "next" else None
    step = plan_step_memory(target, teacher, request)
    room = usable_bytes(request)
    largest = largest_micro_batch(step, request, room)
    if largest == 0:
        raise RegraftError(explain_too_small(step, target, teacher, request, room))

    # A GPU's rows of a step come in equal parts, each as large as fits.
    rows = request.rows_per_gpu or largest
    micro = next(part for part in range(min(largest, rows), 0, -1) if rows % part == 0)
    used = peak_memory(step, request, micro, accumulating=rows > micro)

    throughput = estimate_throughput(target, teacher, step, request)
    return {
        "stage": request.stage,
        "gpus": request.gpus,
        "gpu": request.gpu,
        "precision": request.precision,
        "checkpointing": request.checkpointing,
        "row_tokens": request.length,
        "memory_bytes": request.memory_bytes,
        "used": {name: round(value) for name, value in used.items()},
        "used_bytes": round(sum(used.values())),
        "largest_micro_batch": largest,
        "micro_batch": micro,
        "accumulation": rows // micro,
        "batch": rows * request.gpus,
        "learning": step.trainable_count,
        **throughput,
        **estimate_budget(request, throughput["tokens_per_second"]),
    }


def plan_step_memory(
    target: Checkpoint, teacher: Checkpoint | None, request: TrainingForecastRequest
) -> StepMemory:
    """What a step of the plan takes of memory, by layers; see `measure_step_memory`."""
    from .step_memory import measure_step_memory

    return measure_step_memory(
        target,
        teacher,
        request.stage,
        request.length,
        request.precision == "bfloat16",
        request.checkpointing,
    )


def usable_bytes(request: TrainingForecastRequest) -> int:
    """Bytes of each GPU that training may use."""
    return int(request.memory_bytes * (1 - RESERVE))


def estimate_throughput(
    target: Checkpoint,
    teacher: Checkpoint | None,
    step: StepMemory,
    request: TrainingForecastRequest,
) -> ThroughputForecast:
    """FLOPs of a token, and tokens a second over all GPUs.

    A token takes the student's forward and backward, the teacher's forward, and what checkpointing
    computes again; the GPUs reach a share of the datasheet's peak. In `align` the student's part
    counts by the share of its weights that learn: only its mixers run.

    Args:
        target: what is trained.
        teacher: None without one.
        step: memory of a step, which knows the weights that learn.
        request: the machines and the stage.
    """
    positions = flops.count_positions(target, request.length)
    is_align = request.stage == "align"
    trained = step.trainable_count / step.weight_count if is_align else 1.0
    student = trained * flops.training_flops(target, request.length) / positions

    guide = again = 0.0
    if teacher is not None:
        guide = flops.forward_flops(teacher, request.length) / positions
    if request.checkpointing and not is_align:
        again = flops.forward_flops(target, request.length) / positions

    gpu = GPUS[request.gpu]
    peak = (gpu.bfloat16 if request.precision == "bfloat16" else gpu.float32) * 1e12
    return {
        "student_flops_per_token": student,
        "teacher_flops_per_token": guide,
        "again_flops_per_token": again,
        "peak_flops_per_second": peak,
        "share": request.share,
        "tokens_per_second": request.gpus * peak * request.share / (student + guide + again),
    }


def estimate_budget(request: TrainingForecastRequest, tokens_per_second: float) -> BudgetForecast:
    """Days, GPU hours and cost of the budget, as far as tokens and price are given."""
    if not request.tokens:
        return {}
    tokens = parse_number(request.tokens, "tokens")
    hours = tokens / tokens_per_second / 3600
    budget: BudgetForecast = {
        "tokens": tokens,
        "days": hours / 24,
        "gpu_hours": hours * request.gpus,
    }
    if request.price is not None:
        budget["cost"] = request.price * hours * request.gpus
    return budget


def explain_too_small(
    step: StepMemory,
    target: Checkpoint,
    teacher: Checkpoint | None,
    request: TrainingForecastRequest,
    room: int,
) -> str:
    """What is wrong when not even one row fits, and what to change so that one does.

    Tried in this order: gradient checkpointing, more GPUs (and checkpointing), shorter rows.

    Args:
        step: memory of a step.
        target: what is trained.
        teacher: None without one.
        request: what does not fit.
        room: bytes of each GPU that training may use.
    """

    # Memory of one row: fewer than one are not to be had, so its batch does not matter.
    def one_row(step: StepMemory, request: TrainingForecastRequest) -> float:
        return sum(peak_memory(step, request, 1, accumulating=False).values())

    problem = (
        f"one row of {request.length:,} tokens takes {format_gigabytes(one_row(step, request))} GB "
        f"of the {format_gigabytes(room)} GB that {request.gpus} x "
        f"{format_gigabytes(request.memory_bytes)} GB leave for it"
    )
    if not request.checkpointing and request.stage != "align":
        request = replace(request, checkpointing=True)
        step = plan_step_memory(target, teacher, request)
        needed = one_row(step, request)
        if needed <= room:
            return (
                f"{problem}: give --checkpointing, "
                f"with which it takes {format_gigabytes(needed)} GB"
            )
        problem = f"{problem}, {format_gigabytes(needed)} GB with --checkpointing"

    gpus = 2 * request.gpus
    while gpus <= MAX_GPUS_TRIED:
        if one_row(step, replace(request, gpus=gpus, batch=None)) <= room:
            also = " and --checkpointing" if request.checkpointing else ""
            return f"{problem}: give {gpus} GPUs{also}"
        gpus *= 2
    return f"{problem}: give shorter rows (--length {request.length // 2}) or GPUs with more memory"


def format_gigabytes(count: float) -> str:
    """Bytes as gigabytes."""
    return f"{count / 1e9:,.1f}"


def print_forecast(facts: TrainingForecast, console: Console) -> None:
    """Show a forecast to a person."""
    from rich.table import Table

    title = f"Training ('{facts['stage']}') on {facts['gpus']} GPUs"
    table = Table("on each GPU at the worst moment", "GB", title=title)
    table.columns[1].justify = "right"
    for name, value in facts["used"].items():
        if value:
            table.add_row(name, format_gigabytes(value))
    table.add_row(
        f"of {format_gigabytes(facts['memory_bytes'])}",
        format_gigabytes(facts["used_bytes"]),
        style="bold",
    )
    console.print(table)
    for line in format_speed(facts):
        console.print(line, soft_wrap=True, highlight=False)


def format_speed(facts: TrainingForecast) -> Iterator[str]:
    """Rows of a step, tokens a second, FLOPs of a token and the budget, a line each."""
    yield (
        f"{facts['micro_batch']} rows of {facts['row_tokens']:,} tokens at a time on each GPU "
        f"({facts['largest_micro_batch']} fit), {facts['accumulation']} times a step: "
        f"{facts['batch']:,} rows a step"
    )
    yield (
        f"{facts['tokens_per_second']:,.0f} tokens/s, if {facts['share']:.0%} of the "
        f"{facts['gpu']}'s {facts['peak_flops_per_second'] / 1e12:,.0f} TFLOP/s "
        f"({facts['precision']}, datasheet) are reached"
    )
    yield (
        f"GFLOP per token: student {facts['student_flops_per_token'] / 1e9:,.2f}, "
        f"teacher {facts['teacher_flops_per_token'] / 1e9:,.2f}, "
        f"again {facts['again_flops_per_token'] / 1e9:,.2f}"
    )
    if "days" in facts:
        cost = f", {facts['cost']:,.0f} for them" if "cost" in facts else ""
        yield (
            f"{facts['tokens']:,} tokens: {facts['days']:,.2f} days, "
            f"{facts['gpu_hours']:,.0f} GPU hours{cost}"
        )
