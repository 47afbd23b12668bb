"""How far the gates of a calibrated model open: one number, chosen on the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..core.shapes import Float, Int
from ..mixers.gated import GatedMixer

SHIFTS = (0.0, -2.0, -4.0)  # of the gates' logits; the last closes them all but for a few percent
SLICE = 256  # tokens whose distributions are compared at once


@torch.no_grad()
def choose_gate_shift(
    slots: Sequence[Any],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: Int[Tensor, "rows time"],
    report: Callable[[float], None] = lambda share: None,
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
        report: called with the share of the rows that are judged.

    Returns:
        The shift, None for a model without gates.
    """
    gates = find_gates(slots)
    if not gates:
        return None
    left = torch.zeros(len(SHIFTS), len(input_ids))
    for number, row in enumerate(input_ids):
        report(number / len(input_ids))
        wanted = predict_tokens(teacher, row)
        for shift, kept in zip(SHIFTS, left, strict=True):
            with shift_gates(gates, shift):
                kept[number] = mean_kl(wanted, predict_tokens(student, row))
    # The last shift is that of closed gates.
    worst = (left / left[-1].clamp(min=1e-12)).amax(1)
    best = SHIFTS[int(worst.argmin())]
    for bias in gates:
        bias.add_(best)
    return best


def find_gates(slots: Sequence[Any]) -> list[Tensor]:
    """The biases of the gates beside windows, (heads,) each."""
    mixers = (getattr(slot, "mixer", None) for slot in slots)
    return [mixer.gate.bias for mixer in mixers if isinstance(mixer, GatedMixer)]


def predict_tokens(
    model: PreTrainedModel, row: Int[Tensor, " time"]
) -> Float[Tensor, "time vocab"]:
    """Logits of one row."""
    logits: Tensor = model(row[None].to(model.device), use_cache=False).logits[0]
    return logits


def mean_kl(teacher: Float[Tensor, "time vocab"], student: Float[Tensor, "time vocab"]) -> float:
    """KL(teacher || student) per token, in nats."""
    parts = zip(teacher.split(SLICE), student.split(SLICE), strict=True)
    sums = [
        F.kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), reduction="sum",
                 log_target=True)
        for p, q in parts
    ]  # fmt: skip
    return float(torch.stack(sums).sum()) / len(teacher)


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
