"""Training on machines that are not here: memory of each GPU, rows that fit, tokens a second, days and cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..modeling import flops

if TYPE_CHECKING:
    from rich.console import Console

    from .step_memory import StepMemory

RESERVE = 0.1  # of a GPU's memory, for the libraries, what the allocator cannot use and what collectives hold
SHARE = 0.35  # of the peak that training is assumed to reach
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
MAX_GPUS_TRIED = 4096  # GPUs that are tried when too few were asked for


@dataclass(frozen=True)
class Gpu:
    """An accelerator as its vendor's datasheet has it: dense TFLOP/s in bfloat16 and in float32, bytes of memory."""

    bfloat16: float
    float32: float
    memory: int


# Datasheets of NVIDIA (whose bfloat16 figures are with sparsity, twice these) and AMD; float32 is without TF32.
GPUS = {
    "a10": Gpu(125, 31.2, 24),
    "a100": Gpu(312, 19.5, 80),
    "a100-40": Gpu(312, 19.5, 40),
    "b200": Gpu(2250, 75, 180),
    "h100": Gpu(989, 67, 80),
    "h100-pcie": Gpu(756, 51, 80),
    "h200": Gpu(989, 67, 141),
    "l4": Gpu(121, 30.3, 24),
    "l40s": Gpu(362, 91.6, 48),
    "mi300x": Gpu(1307, 163.4, 192),
}


@dataclass(frozen=True)
class TrainingForecastRequest:
    """What is planned. `gpus`: how many, over which FSDP2 shards everything; `memory`: bytes of each, such as `80GB`
    (default: what `gpu` has); `tokens`: a budget, such as `1B`; `length`, `batch`: tokens a row, rows a step over all
    GPUs (default: what fits at once); `price`: of one GPU for an hour; `share`: of the peak that is reached.
    """

    gpus: int = 1
    memory: str | None = None
    tokens: str | None = None
    length: int = 1024
    batch: int | None = None
    checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gpu: str = "h100"
    price: float | None = None
    stage: Literal["align", "distil", "next"] = "distil"
    share: float = SHARE

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise RegraftError(
                f"no datasheet of '{self.gpu}' here: give one of {', '.join(GPUS)}, and --memory"
            )
        if min(self.gpus, self.length) < 1 or not 0 < self.share <= 1:
            raise RegraftError(
                f"{self.gpus} GPUs, rows of {self.length}, share {self.share} of the peak: give 1 or more, and a share "
                "above 0, at most 1"
            )
        if self.batch is not None and (self.batch < 1 or self.batch % self.gpus):
            raise RegraftError(
                f"batch is {self.batch} rows for {self.gpus} GPUs: give a multiple of {self.gpus}"
            )
        if self.memory_bytes < 1 or (self.tokens and parse_number(self.tokens, "tokens") < 1):
            raise RegraftError(
                f"memory '{self.memory}', tokens '{self.tokens}': give more than nothing"
            )

    @property
    def memory_bytes(self) -> int:
        """Memory of a GPU."""
        return parse_number(self.memory, "memory") if self.memory else GPUS[self.gpu].memory * 10**9


def parse_number(text: str, what: str) -> int:
    """`80GB`, `1.5B` or `200000` as a number; RegraftError when it is none."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?) ?([KMGBT]?)B?", text.strip(), re.I)
    if not found:
        raise RegraftError(f"{what} is '{text}': give a number such as 200000, 500M, 1B or 80GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def forecast(
    source: Checkpoint, target: Checkpoint, asked: TrainingForecastRequest
) -> dict[str, Any]:
    """The forecast for training `target`, made from `source`, which is the teacher of `align` and `distil`.

    RegraftError, with what would fit, when not even one row does; when the stage does not suit the model.
    """
    if not target.anatomy.host(target.config).causal:
        raise RegraftError(
            f"a {target.config['model_type']} does not predict the next token: plan a decoder's training"
        )
    if asked.stage == "align" and not any(target.config.get("mixers") or []):
        raise RegraftError(
            f"stage '{asked.stage}' fits mixers, and this plan has none: give --mixer or --method"
        )
    teacher = source if asked.stage != "next" else None
    step = plan_step_memory(target, teacher, asked)
    room = int(asked.memory_bytes * (1 - RESERVE))
    most = largest_micro_batch(step, asked, room)
    if most == 0:
        raise RegraftError(explain_too_small(step, target, teacher, asked, room))
    share = asked.batch // asked.gpus if asked.batch else most
    micro = next(rows for rows in range(min(most, share), 0, -1) if share % rows == 0)
    used = peak_memory(step, asked, micro, share > micro)
    speed = estimate_throughput(target, teacher, step, asked)
    facts: dict[str, Any] = {
        "stage": asked.stage, "gpus": asked.gpus, "gpu": asked.gpu, "precision": asked.precision,
        "checkpointing": asked.checkpointing, "row_tokens": asked.length, "memory_bytes": asked.memory_bytes,
        "used": {name: round(value) for name, value in used.items()}, "used_bytes": round(sum(used.values())),
        "largest_micro_batch": most, "micro_batch": micro, "accumulation": share // micro, "batch": share * asked.gpus,
        "learning": step.trainable_count, **speed,
    }  # fmt: skip
    return facts | estimate_budget(asked, speed["tokens_per_second"])


def plan_step_memory(
    target: Checkpoint, teacher: Checkpoint | None, asked: TrainingForecastRequest
) -> StepMemory:
    """What a step of the plan takes of memory, by layers."""
    from .step_memory import measure_step_memory as simulated

    return simulated(
        target,
        teacher,
        asked.stage,
        asked.length,
        asked.precision == "bfloat16",
        asked.checkpointing,
    )


def largest_micro_batch(step: StepMemory, asked: TrainingForecastRequest, room: int) -> int:
    """How many rows at a time fit into `room` bytes of each GPU; 0 when none do. The batch's share is not exceeded."""

    def fits(rows: int) -> bool:
        return (
            sum(
                peak_memory(
                    step, asked, rows, asked.batch is not None and asked.batch // asked.gpus > rows
                ).values()
            )
            <= room
        )

    low, high = 0, 1
    while fits(high) and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def peak_memory(
    step: StepMemory, asked: TrainingForecastRequest, rows: int, accumulating: bool
) -> dict[str, float]:
    """Bytes on each GPU at the worst moment of a step on `rows` rows at a time, by what they are for."""
    return max(
        memory_by_moment(step, asked, rows, accumulating), key=lambda parts: sum(parts.values())
    )


def memory_by_moment(
    step: StepMemory, asked: TrainingForecastRequest, rows: int, accumulating: bool
) -> Iterator[dict[str, float]]:
    """Bytes by what they are for, at the moments of a step that can be the worst.

    FSDP2 as the loop uses it: float32 throughout; embedding, final norm and head are one unit, whole on every GPU for
    the length of the step with their gradient; each layer is one, whole while it runs, with the next one on its way,
    and in the backward pass with its gradient and the copy of it that is being summed over GPUs.
    """
    gpus, several = asked.gpus, asked.gpus > 1
    state = {
        "parameters": 4 * step.weight_count / gpus,
        "adam": 8 * step.trainable_count / gpus,
        "teacher": 4 * (step.teacher + step.teacher_rest) / gpus,
    }
    unit = 4.0 * max(layer.weights for layer in step.layers) * several
    ends = 4.0 * (step.rest + step.teacher_rest) * several
    sums = 4 * step.trainable_count / gpus
    done = sums if accumulating else 0.0

    def build_moment(
        gathered: float, gradients: float, activations: float, working: float
    ) -> dict[str, float]:
        return state | {
            "gradients": max(done, gradients), "gathered": ends + gathered, "activations": activations,
            "working": working,
        }  # fmt: skip

    if asked.stage == "align":
        yield build_moment(
            2 * unit, sums, step.around(rows), max(layer.working(rows) for layer in step.layers)
        )
        return
    kept = sum(layer.kept(rows) for layer in step.layers)
    held = sum(layer.forward(rows) for layer in step.layers)
    yield build_moment(2 * unit, 0.0, step.around(rows) + kept, held)
    yield build_moment(unit, 0.0, kept, step.ends(rows))
    first, *others = step.layers
    yield build_moment(3 * unit, step.head, step.around(rows) + kept, step.layers[-1].working(rows))
    above = step.head + 4 * sum(layer.trainable for layer in others) / gpus
    yield build_moment(3 * unit, above, step.around(rows) + first.kept(rows), first.working(rows))
    rest = 4.0 * step.rest_trainable * several
    yield build_moment(rest, sums + rest, 0.0, step.tied)


def estimate_throughput(
    target: Checkpoint, teacher: Checkpoint | None, step: StepMemory, asked: TrainingForecastRequest
) -> dict[str, float]:
    """FLOPs of a token and tokens a second over all GPUs: the student's forward and backward, the teacher's forward,
    and what checkpointing computes again, at a share of the datasheet's peak. In `align` the student's part counts by
    the share of its weights that learn.
    """
    row = flops.count_positions(target, asked.length)
    part = step.trainable_count / step.weight_count if asked.stage == "align" else 1.0
    student = part * flops.training_flops(target, asked.length) / row
    guide = flops.forward_flops(teacher, asked.length) / row if teacher is not None else 0.0
    again = (
        flops.forward_flops(target, asked.length) / row
        if asked.checkpointing and asked.stage != "align"
        else 0.0
    )
    best = getattr(GPUS[asked.gpu], asked.precision) * 1e12
    rate = asked.gpus * best * asked.share / (student + guide + again)
    return {
        "student_flops_per_token": student, "teacher_flops_per_token": guide, "again_flops_per_token": again,
        "peak_flops_per_second": best, "share": asked.share, "tokens_per_second": rate,
    }  # fmt: skip


def estimate_budget(asked: TrainingForecastRequest, rate: float) -> dict[str, float]:
    """Tokens, days, GPU hours and cost, as far as they were asked for."""
    if not asked.tokens:
        return {}
    tokens = parse_number(asked.tokens, "tokens")
    hours = tokens / rate / 3600
    found = {"tokens": tokens, "days": hours / 24, "gpu_hours": hours * asked.gpus}
    return found | ({"cost": asked.price * hours * asked.gpus} if asked.price is not None else {})


def explain_too_small(
    step: StepMemory,
    target: Checkpoint,
    teacher: Checkpoint | None,
    asked: TrainingForecastRequest,
    room: int,
) -> str:
    """What is wrong when not even one row fits, and what to change so that one does."""

    def memory_needed(made: StepMemory, plan: TrainingForecastRequest) -> float:
        return sum(peak_memory(made, plan, 1, False).values())

    here = f"one row of {asked.length:,} tokens takes {format_gigabytes(memory_needed(step, asked))} GB of the {format_gigabytes(room)} GB that"
    here = f"{here} {asked.gpus} x {format_gigabytes(asked.memory_bytes)} GB leave for it"
    if not asked.checkpointing and asked.stage != "align":
        plan = replace(asked, checkpointing=True)
        lean = plan_step_memory(target, teacher, plan)
        if memory_needed(lean, plan) <= room:
            return f"{here}: give --checkpointing, with which it takes {format_gigabytes(memory_needed(lean, plan))} GB"
        step, asked, here = (
            lean,
            plan,
            f"{here}, {format_gigabytes(memory_needed(lean, plan))} GB with --checkpointing",
        )
    for gpus in (asked.gpus * 2**power for power in range(1, 13)):
        if (
            gpus <= MAX_GPUS_TRIED
            and memory_needed(step, replace(asked, gpus=gpus, batch=None)) <= room
        ):
            return f"{here}: give {gpus} GPUs" + (
                " and --checkpointing" if asked.checkpointing else ""
            )
    return f"{here}: give shorter rows (--length {asked.length // 2}) or GPUs with more memory"


def format_gigabytes(count: float) -> str:
    """Bytes as gigabytes."""
    return f"{count / 1e9:,.1f}"


def print_forecast(facts: Mapping[str, Any], console: Console) -> None:
    """Show a forecast to a person."""
    from rich.table import Table

    table = Table(
        "on each GPU at the worst moment",
        "GB",
        title=f"Training ('{facts['stage']}') on {facts['gpus']} GPUs",
    )
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
    per = {name: facts[f"{name}_flops_per_token"] / 1e9 for name in ("student", "teacher", "again")}
    lines = [
        f"{facts['micro_batch']} rows of {facts['row_tokens']:,} tokens at a time on each GPU "
        f"({facts['largest_micro_batch']} fit), {facts['accumulation']} times a step: {facts['batch']:,} rows a step",
        f"{facts['tokens_per_second']:,.0f} tokens/s, if {facts['share']:.0%} of the {facts['gpu']}'s "
        f"{facts['peak_flops_per_second'] / 1e12:,.0f} TFLOP/s ({facts['precision']}, datasheet) are reached",
        f"GFLOP per token: student {per['student']:,.2f}, teacher {per['teacher']:,.2f}, again {per['again']:,.2f}",
    ]
    if "days" in facts:
        cost = f", {facts['cost']:,.0f} for them" if "cost" in facts else ""
        lines.append(
            f"{facts['tokens']:,} tokens: {facts['days']:,.2f} days, {facts['gpu_hours']:,.0f} GPU hours{cost}"
        )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
