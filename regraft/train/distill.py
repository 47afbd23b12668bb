"""Distillation: KL to a teacher's distribution, mixed with next-token cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.rows import Packed
from .fsdp_forward import run_in_forward
from .kl import head_kl
from .objectives import IGNORED, last_hidden
from .teacher_cache import CachedTeacher, Teacher


def distil_step(
    model: PreTrainedModel,
    teacher: Teacher,
    rows: Packed,
    fast: bool,
    ce: float = 0.0,
    labels: Tensor | None = None,
    shares: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Backpropagate (1 - ce) KL(teacher || student) + ce x next-token cross-entropy.

    The KL is per token, over the whole vocabulary, or over what a cached teacher keeps of it.

    Args:
        model: the student; gradients are added to its parameters.
        teacher: a model, or one behind a cache.
        rows: (batch, time) token ids.
        fast: bfloat16 autocast.
        ce: weight of the cross-entropy.
        labels: (batch, time - 1) next tokens, -100 where none is asked; needed for `ce`.
        shares: what these rows weigh in the batch's mean, for the KL and for the cross-entropy.

    Returns:
        The loss.
    """

    def weighted_loss() -> Tensor:
        loss, student, head = compute_kl(model, teacher, rows, fast)
        loss = (1 - ce) * shares[0] * loss
        if ce and labels is not None:
            scores = head(student[:, :-1]).flatten(0, 1)  # (batch * (time - 1), vocab)
            loss = loss + ce * shares[1] * F.cross_entropy(
                scores, labels.flatten(), ignore_index=IGNORED
            )
        return loss

    # The head's matrix is read outside the model's own forward, which FSDP would not see.
    loss = run_in_forward(model, weighted_loss)
    loss.backward()
    return float(loss.detach())


def compute_kl(
    model: PreTrainedModel, teacher: Teacher, rows: Packed, fast: bool
) -> tuple[Tensor, Tensor, nn.Linear]:
    """(KL(teacher || model) per token, the model's last hidden states, its head)."""
    if isinstance(teacher, CachedTeacher):
        student, head = last_hidden(model, rows, fast), model.get_output_embeddings()
        return teacher.compute_kl(student, head, rows, fast), student, head

    with torch.no_grad():
        target = run_in_forward(teacher, lambda: last_hidden(teacher, rows, fast))
    student, head = last_hidden(model, rows, fast), model.get_output_embeddings()
    return head_kl(student, head, target, teacher.get_output_embeddings(), fast), student, head


@torch.no_grad()
def evaluate_kl(model: PreTrainedModel, teacher: Teacher, rows: Packed, batch: int = 16) -> float:
    """KL(teacher || model) per token over all rows, `batch` rows at a time."""
    total = 0.0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        total += len(some) * float(compute_kl(model, teacher, some, fast=False)[0])
    return total / len(rows)
