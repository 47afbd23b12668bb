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
from .calibrate import output_error, relative_squared_error
from .fsdp_forward import run_in_forward
from .hooks import LayerRecord, record_layers, run_decoder
from .teacher_cache import CachedTeacher, Teacher

Loss = Callable[[Mixer, LayerRecord, Tensor | None], Tensor]


def mixers_by_layer(model: PreTrainedModel) -> dict[int, Mixer]:
    """Converted layers of a linearized model."""
    return {
        i: slot.mixer
        for i, slot in enumerate(model.slots())
        if isinstance(getattr(slot, "mixer", None), Mixer)
    }


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
    return train_mixers_step(model, teacher, teacher_slots, rows, fast, output_loss, weight)


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
    if isinstance(
        teacher, CachedTeacher
    ):  # matrices are not kept: they are larger than what makes them
        teacher, teacher_slots = teacher.model, teacher.slots
    with output_attention_weights(teacher):
        return train_mixers_step(
            model, teacher, teacher_slots, as_single_documents(rows), fast, matrix_loss, weight
        )


def output_loss(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """A mixer's relative squared error against its layer's output, the mean over rows, a scalar."""
    return output_error(mixer, record, record.mixer_context(segments))


def matrix_loss(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """The relative squared distance of a mixer's matrices from the softmax matrices, per row, the mean.

    RegraftError when the record has none.
    """
    if record.weights is None:
        raise RegraftError(
            f"the teacher gives no attention weights beside its {list(record.outputs.shape)}: leave out the stage "
            "'matrix'"
        )
    return relative_squared_error(
        mixer.matrix(record.inputs, record.mixer_context(None)), record.weights.float()
    )


def as_single_documents(rows: Packed) -> Packed:
    """The same rows, each read as one document."""
    whole = torch.arange(rows.input_ids.shape[1], device=rows.device).expand_as(rows.input_ids)
    return replace(rows, position_ids=whole)


def train_mixers_step(
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
    converted, segments, losses = mixers_by_layer(model), rows.segments(), []
    device = rows.input_ids.device.type

    def backpropagate(layer: int, record: LayerRecord) -> None:
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=fast):
            value = weight * loss(converted[layer], record, segments)
        value.backward()
        losses.append(float(value.detach()))

    if isinstance(teacher, CachedTeacher):
        for layer, record in teacher.read_layer_records(rows, list(converted), fast):
            backpropagate(layer, record)
        return sum(losses) / len(losses)
    with (
        record_layers(slots, list(converted), backpropagate),
        torch.autocast(device, torch.bfloat16, enabled=fast),
    ):
        run_in_forward(teacher, lambda: run_decoder(teacher, rows.input_ids, rows.position_ids))
    return sum(losses) / len(losses)


def teacher_cost_key(
    model: PreTrainedModel, teacher: Teacher | None, kind: str, rows: Any, fast: bool
) -> str:
    """What a teacher behind a cache adds to the key of a step's cost, nothing for other teachers."""
    if not isinstance(teacher, CachedTeacher) or kind not in ("align", "distil"):
        return ""
    return teacher.cost_key(rows, fast, list(mixers_by_layer(model)) if kind == "align" else None)


@contextmanager
def output_attention_weights(model: Any) -> Iterator[None]:
    """Inside, attention layers also give their softmax matrices."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kind)
