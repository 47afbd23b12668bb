"""How far the gates of a calibrated model open: one number, chosen on the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.perplexity import Candidate, measure
from ..mixers.gated import GatedMixer

SHIFTS = (0.0, -2.0, -4.0)  # of the gates' logits; the last closes them all but for a few percent
TEACHER = "teacher"


@torch.no_grad()
def choose_gate_shift(
    slots: Sequence[Any], student: PreTrainedModel, teacher: PreTrainedModel, input_ids: Tensor
) -> float | None:
    """Add to the gates' logits that one of SHIFTS which brings every row nearest to the teacher.

    The closed form opens each gate by its own layer's error, on the rows it has seen. Where little
    is left to explain, as beside a wide window, what the layers add together may take a row of
    another kind away from the teacher. So KL is taken by row, as a share of what closed gates
    leave, and the row that gains least decides.

    Args:
        slots: the student's attention modules, by layer.
        student: the calibrated model.
        teacher: the source model.
        input_ids: rows to judge on, (rows, time).

    Returns:
        The shift, None for a model without gates.
    """
    mixers = [getattr(slot, "mixer", None) for slot in slots]
    gates = [mixer.gate.bias for mixer in mixers if isinstance(mixer, GatedMixer)]
    if not gates:
        return None
    shifted = {
        str(shift): Candidate(student, partial(shift_gates, gates, shift)) for shift in SHIFTS
    }
    scores = measure(
        {TEACHER: Candidate(teacher), **shifted}, input_ids, torch.ones(len(input_ids)), TEACHER
    )
    left = {shift: torch.tensor(scores[str(shift)].divergences) for shift in SHIFTS}
    closed = left[SHIFTS[-1]].clamp(min=1e-12)
    best = min(SHIFTS, key=lambda shift: float((left[shift] / closed).max()))
    for bias in gates:
        bias.add_(best)
    return best


@contextlib.contextmanager
def shift_gates(gates: Sequence[Tensor], shift: float) -> Iterator[None]:
    """Gates with `shift` added to their logits, for a while."""
    before = [bias.detach().clone() for bias in gates]
    try:
        for bias in gates:
            bias.data.add_(shift)
        yield
    finally:
        for bias, value in zip(gates, before, strict=True):
            bias.data.copy_(value)
