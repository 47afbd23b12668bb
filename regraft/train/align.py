"""Mixers matched to their teacher's layers, each on its own: outputs, or the matrices that mix tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.packing import Packed
from ..errors import RegraftError
from ..mixers.base import Mixer
from .calibrate import error, relative
from .fsdp_forward import inside
from .hooks import LayerRecord, body, recording
from .teacher_cache import Lessons, Teacher

Loss = Callable[[Mixer, LayerRecord, Tensor | None], Tensor]


def mixers(model: PreTrainedModel) -> dict[int, Mixer]:
    """Converted layers of a linearized model."""
    return {i: slot.mixer for i, slot in enumerate(model.slots()) if isinstance(getattr(slot, "mixer", None), Mixer)}


def align_step(
    model: PreTrainedModel,
    teacher: Teacher,
    teacher_slots: list[nn.Module],
    rows: Packed,
    fast: bool,
    weight: float = 1.0,
) -> float:
    """Each mixer's relative squared error against its layer's output, per row, on the teacher's inputs, backpropagated;
    the mean over rows and converted layers, both times `weight`."""
    return step(model, teacher, teacher_slots, rows, fast, apart, weight)


def matrix_step(
    model: PreTrainedModel,
    teacher: Teacher,
    teacher_slots: list[nn.Module],
    rows: Packed,
    fast: bool,
    weight: float = 1.0,
) -> float:
    """||A - M||^2 / ||A||^2 of each row, A the softmax matrices of a layer and M the mixer's, both (heads, time, time),
    on the teacher's inputs (MOHAWK's first stage, arXiv 2408.10189, eq. 4); backpropagated, the mean over rows and
    converted layers.

    Rows are read as single documents, as the teacher's attention weights come without their boundaries.
    """
    if isinstance(teacher, Lessons):  # matrices are not kept: they are larger than what makes them
        teacher, teacher_slots = teacher.model, teacher.slots
    with showing_weights(teacher):
        return step(model, teacher, teacher_slots, single(rows), fast, matrices_apart, weight)


def apart(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """A mixer's relative squared error against its layer's output, the mean over rows, a scalar."""
    return error(mixer, record, record.mixing(segments))


def matrices_apart(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """The relative squared distance of a mixer's matrices from the softmax matrices, per row, the mean.

    RegraftError when the record has none.
    """
    if record.weights is None:
        raise RegraftError(
            f"the teacher gives no attention weights beside its {list(record.outputs.shape)}: leave out the stage "
            "'matrix'"
        )
    return relative(mixer.matrix(record.inputs, record.mixing(None)), record.weights.float())


def single(rows: Packed) -> Packed:
    """The same rows, each read as one document."""
    whole = torch.arange(rows.input_ids.shape[1], device=rows.device).expand_as(rows.input_ids)
    return replace(rows, position_ids=whole)


def step(
    model: PreTrainedModel,
    teacher: Teacher,
    slots: list[nn.Module],
    rows: Packed,
    fast: bool,
    loss: Loss,
    weight: float,
) -> float:
    """One forward of the teacher's body, or what is kept of it; a loss per converted layer, each backpropagated at
    once; their mean."""
    converted, segments, losses = mixers(model), rows.segments(), []
    device = rows.input_ids.device.type

    def learn(layer: int, record: LayerRecord) -> None:
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=fast):
            value = weight * loss(converted[layer], record, segments)
        value.backward()
        losses.append(float(value.detach()))

    if isinstance(teacher, Lessons):
        for layer, record in teacher.records(rows, list(converted), fast):
            learn(layer, record)
        return sum(losses) / len(losses)
    with recording(slots, list(converted), learn), torch.autocast(device, torch.bfloat16, enabled=fast):
        inside(teacher, lambda: body(teacher, rows.input_ids, rows.position_ids))
    return sum(losses) / len(losses)


def taught(model: PreTrainedModel, teacher: Teacher | None, kind: str, rows: Any, fast: bool) -> str:
    """What a teacher behind a cache adds to the key of a step's cost, nothing for other teachers."""
    if not isinstance(teacher, Lessons) or kind not in ("align", "distil"):
        return ""
    return teacher.cost(rows, fast, list(mixers(model)) if kind == "align" else None)


@contextmanager
def showing_weights(model: Any) -> Iterator[None]:
    """Inside, attention layers also give their softmax matrices."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kind)
