"""Memory of each GPU in a training step that FSDP2 shards, and the rows that fit."""

from __future__ import annotations

from collections.abc import Iterator

from .memory_model import StepMemory
from .training_request import TrainingForecastRequest

MAX_ROWS_TRIED = 2**16

MemoryUse = dict[str, float]
"""Bytes on one GPU by what they are for.

- `parameters`, `adam`: the student's weights and Adam's moments, this GPU's share.
- `teacher`: the teacher's weights, this GPU's share.
- `gradients`: sums of gradients, and those not yet reduced over GPUs.
- `gathered`: weights that are whole on this GPU because they are in use.
- `activations`: what the backward pass needs of the forward pass.
- `working`: what the running operation needs beside it.
"""


def largest_micro_batch(step: StepMemory, request: TrainingForecastRequest, room: int) -> int:
    """How many rows at a time fit on each GPU; 0 when none do.

    Args:
        step: memory of a step.
        request: how many GPUs share it, and the batch.
        room: bytes of each GPU that training may use.
    """

    def fits(rows: int) -> bool:
        accumulating = request.rows_per_gpu is not None and request.rows_per_gpu > rows
        return sum(peak_memory(step, request, rows, accumulating).values()) <= room

    # Double until it does not fit, then halve the interval: `low` fits, `high` does not.
    low, high = 0, 1
    while fits(high) and high < MAX_ROWS_TRIED:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def peak_memory(
    step: StepMemory, request: TrainingForecastRequest, rows: int, accumulating: bool
) -> MemoryUse:
    """Bytes on each GPU at the worst moment of a step; arguments as of `memory_by_moment`."""
    moments = memory_by_moment(step, request, rows, accumulating)
    return max(moments, key=lambda use: sum(use.values()))


def memory_by_moment(
    step: StepMemory, request: TrainingForecastRequest, rows: int, accumulating: bool
) -> Iterator[MemoryUse]:
    """Bytes on each GPU at the moments of a step that can be the worst.

    FSDP2 as the training loop uses it, float32 throughout. Embedding, final norm and head are one
    unit, whole on every GPU for the length of the step with their gradient. Each layer is a unit:
    whole while it runs, with the next one on its way, and in the backward pass with its gradient
    and the copy of it that is being summed over GPUs.

    Args:
        step: memory of the step.
        request: its stage and GPUs.
        rows: rows at a time on one GPU.
        accumulating: whether a step has several batches of rows, whose gradients are summed.
    """
    gpus, is_sharded = request.gpus, request.gpus > 1
    state = {
        "parameters": 4 * step.weight_count / gpus,
        "adam": 8 * step.trainable_count / gpus,
        "teacher": 4 * (step.teacher + step.teacher_rest) / gpus,
    }

    # Without sharding the weights in `state` are whole already: nothing is gathered.
    layer_unit = 4.0 * max(layer.weights for layer in step.layers) * is_sharded
    ends_unit = 4.0 * (step.rest + step.teacher_rest) * is_sharded
    all_gradients = 4 * step.trainable_count / gpus
    earlier_gradients = all_gradients if accumulating else 0.0

    def build_moment(
        gathered: float, gradients: float, activations: float, working: float
    ) -> MemoryUse:
        return state | {
            "gradients": max(earlier_gradients, gradients),
            "gathered": ends_unit + gathered,
            "activations": activations,
            "working": working,
        }

    around = step.around(rows)
    if request.stage == "align":
        working = max(layer.working(rows) for layer in step.layers)
        yield build_moment(2 * layer_unit, all_gradients, around, working)
        return
    first, *above = step.layers
    kept = sum(layer.kept(rows) for layer in step.layers)

    # The end of the forward pass through the layers, and the loss.
    forward = sum(layer.forward(rows) for layer in step.layers)
    yield build_moment(2 * layer_unit, 0.0, around + kept, forward)
    yield build_moment(layer_unit, 0.0, kept, step.ends(rows))

    # The backward pass of the last layer, when all activations are there, and of the first, when
    # all gradients above it are.
    working = step.layers[-1].working(rows)
    yield build_moment(3 * layer_unit, step.head, around + kept, working)
    gradients = step.head + 4 * sum(layer.trainable for layer in above) / gpus
    yield build_moment(3 * layer_unit, gradients, around + first.kept(rows), first.working(rows))

    # The end of the backward pass: gradients of what is outside the layers.
    rest = 4.0 * step.rest_trainable * is_sharded
    yield build_moment(rest, all_gradients + rest, 0.0, step.tied)
