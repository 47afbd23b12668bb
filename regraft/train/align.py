"""Mixers matched to their teacher's layers, each on its own: outputs, or softmax matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.rows import Packed
from ..errors import RegraftError
from ..mixers.base import Mixer
from .calibrate import output_error, relative_squared_error
from .fsdp_forward import run_in_forward
from .hooks import LayerRecord, record_layers, run_decoder
from .teacher_cache import CachedTeacher, Teacher

# From a mixer, what its layer got and gave, and the rows' segments: a scalar.
Loss = Callable[[Mixer, LayerRecord, Tensor | None], Tensor]


def mixers_by_layer(model: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers of a linearized model, by number of the layer."""
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
    """Backpropagate each mixer's relative squared error against its layer's output.

    Args:
        model: the linearized model; gradients are added to its mixers.
        teacher: its source; mixers get the inputs of the teacher's layers, not each other's.
        teacher_slots: the teacher's attention modules, by layer.
        rows: (batch, time) token ids.
        fast: bfloat16 autocast.
        weight: what these rows weigh in the batch's mean.

    Returns:
        The mean over rows and converted layers, times `weight`.
    """
    return train_mixers_step(model, teacher, teacher_slots, rows, fast, output_loss, weight)


def matrix_step(
    model: PreTrainedModel,
    teacher: Teacher,
    teacher_slots: list[nn.Module],
    rows: Packed,
    fast: bool,
    weight: float = 1.0,
) -> float:
    """Backpropagate each mixer's distance from its layer's softmax matrices, as `align_step`.

    The loss is ||A - M||^2 / ||A||^2 of each row, A the layer's softmax matrices and M the
    mixer's, both (heads, time, time): MOHAWK's first stage (arXiv 2408.10189, eq. 4). Rows are
    read as single documents, as the teacher's attention weights come without their boundaries.
    """
    if isinstance(teacher, CachedTeacher):
        # Matrices are not cached: they are larger than what they are computed from.
        teacher, teacher_slots = teacher.model, teacher.slots

    with output_attention_weights(teacher):
        return train_mixers_step(
            model, teacher, teacher_slots, as_single_documents(rows), fast, matrix_loss, weight
        )


def output_loss(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """A mixer's relative squared error against its layer's output, the mean over rows."""
    return output_error(mixer, record, record.mixer_context(segments))


def matrix_loss(mixer: Mixer, record: LayerRecord, segments: Tensor | None) -> Tensor:
    """A mixer's relative squared error against the softmax matrices, the mean over rows.

    RegraftError when the record has none.
    """
    if record.weights is None:
        raise RegraftError(
            f"the teacher gives no attention weights beside its {list(record.outputs.shape)}: "
            "leave out the stage 'matrix'"
        )
    matrices = mixer.matrix(record.inputs, record.mixer_context(None))
    return relative_squared_error(matrices, record.weights.float())


def as_single_documents(rows: Packed) -> Packed:
    """The same rows, each read as one document."""
    positions = torch.arange(rows.input_ids.shape[1], device=rows.device)
    return replace(rows, position_ids=positions.expand_as(rows.input_ids))


def train_mixers_step(
    model: PreTrainedModel,
    teacher: Teacher,
    slots: list[nn.Module],
    rows: Packed,
    fast: bool,
    loss: Loss,
    weight: float,
) -> float:
    """One forward pass of the teacher's body, or its cached layers, and a loss for each mixer.

    Arguments as in `align_step`; returns the mean loss of the mixers, times `weight`.
    """
    converted, segments = mixers_by_layer(model), rows.segments()
    losses: list[float] = []
    device = rows.input_ids.device.type

    def backpropagate(layer: int, record: LayerRecord) -> None:
        # At once, within the teacher's forward pass, so that one layer's graph is in memory.
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
    """What a cached teacher adds to the key of a step's FLOPs; nothing for other teachers.

    It depends on how many of the rows are cached already.
    """
    if not isinstance(teacher, CachedTeacher) or kind not in ("align", "distil"):
        return ""
    return teacher.cost_key(rows, fast, list(mixers_by_layer(model)) if kind == "align" else None)


@contextmanager
def output_attention_weights(model: Any) -> Iterator[None]:
    """Inside, attention layers also return their softmax matrices."""
    implementation = model.config._attn_implementation
    # Fused attention kernels never form the matrices; transformers' "eager" code does.
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
