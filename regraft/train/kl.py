"""KL divergence through the head, a slice of tokens at a time.

The (tokens, vocab) matrices of logits and of their gradients never exist whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE = 256  # tokens at a time


class HeadKL(torch.autograd.Function):
    """Mean over tokens of KL(softmax(t U^T) || softmax(h W^T)).

    h, t: (tokens, hidden) the student's and the teacher's last hidden states; W, U: (vocab,
    hidden) their heads. The gradient to the logits is (softmax - target) / tokens. The products
    that give the loss are float32; with `fast` those that only carry the gradient are bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor, fast: bool
    ) -> Tensor:
        """The loss, a scalar; the gradients are computed on the way.

        A backward pass of its own would have to compute every slice's logits again.
        """
        tokens = h.shape[0]
        total = h.new_zeros(())
        grad_h = torch.empty_like(h)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        grad_dtype = torch.bfloat16 if fast else h.dtype
        head_for_grad = head.to(grad_dtype)

        for start in range(0, tokens, SLICE):
            part = slice(start, start + SLICE)
            # Log-probabilities, (slice, vocab).
            target = (t[part] @ teacher_head.mT).log_softmax(-1)
            student = (h[part] @ head.mT).log_softmax(-1)
            gap = target - student
            weight = target.exp_()
            total += torch.dot(weight.flatten(), gap.flatten())

            # In place: `target` and `student` are used up, and are the largest tensors here.
            grad = student.exp_().sub_(weight).div_(tokens).to(grad_dtype)
            grad_h[part] = (grad @ head_for_grad).to(h.dtype)
            if grad_head is not None:
                grad_head += (grad.mT @ h[part].to(grad_dtype)).to(head.dtype)

        ctx.save_for_backward(grad_h, *([grad_head] if grad_head is not None else []))
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that `forward` has computed."""
        grad_h, *grad_head = ctx.saved_tensors
        return grad_h * outer[0], grad_head[0] * outer[0] if grad_head else None, None, None, None


def head_kl(
    h: Tensor, head: torch.nn.Linear, t: Tensor, teacher_head: torch.nn.Linear, fast: bool
) -> Tensor:
    """Mean KL(teacher || student) per token, a scalar.

    Args:
        h: the student's last hidden states (batch, time, hidden), float32.
        head: its head. Two heads without bias are computed a slice of tokens at a time.
        t: the teacher's last hidden states (batch, time, teacher's hidden), float32.
        teacher_head: its head.
        fast: bfloat16 for products that only carry the gradient.
    """
    h, t = h.flatten(0, 1), t.flatten(0, 1)
    if head.bias is None and teacher_head.bias is None:
        return HeadKL.apply(h, head.weight, t, teacher_head.weight, fast)
    target, student = teacher_head(t).log_softmax(-1), head(h).log_softmax(-1)
    return (target.exp() * (target - student)).sum(-1).mean()


class TopKKL(torch.autograd.Function):
    """Mean over tokens of the KL over K + 1 outcomes: K named tokens, and all others as one.

    h: (tokens, hidden); head: (vocab, hidden); names: (tokens, K) long, ids of the named tokens;
    logs: (tokens, K + 1), the teacher's log-probabilities of these and, last, of the rest.
    K = vocab is the full KL.

    The gradient to the logits is softmax - target for the named tokens, and softmax times
    1 - (target's rest / softmax's rest) for the others.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, names: Tensor, logs: Tensor, fast: bool
    ) -> Tensor:
        """The loss, a scalar; the gradients are computed on the way, as in `HeadKL`."""
        tokens = h.shape[0]
        total = h.new_zeros(())
        grad_h = torch.empty_like(h)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        grad_dtype = torch.bfloat16 if fast else h.dtype
        head_for_grad = head.to(grad_dtype)

        for start in range(0, tokens, SLICE):
            part = slice(start, start + SLICE)
            ids, target = names[part], logs[part]
            student = (h[part] @ head.mT).log_softmax(-1)  # (slice, vocab)
            named = student.gather(-1, ids)  # (slice, K)
            rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)  # (slice, 1)

            # An outcome of probability 0 adds nothing, where 0 x (-inf) would give NaN.
            weight = target.exp()
            gap = target - torch.cat((named, rest), -1)
            total += torch.where(weight > 0, weight * gap, 0.0).sum()

            ratio = torch.where(weight[:, -1:] > 0, (target[:, -1:] - rest).exp(), 0.0)
            named_grad = named.exp() - weight[:, :-1]
            grad = student.exp_().mul_(1 - ratio).scatter_(-1, ids, named_grad)
            grad = grad.div_(tokens).to(grad_dtype)
            grad_h[part] = (grad @ head_for_grad).to(h.dtype)
            if grad_head is not None:
                grad_head += (grad.mT @ h[part].to(grad_dtype)).to(head.dtype)

        ctx.save_for_backward(grad_h, *([grad_head] if grad_head is not None else []))
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that `forward` has computed."""
        grad_h, *grad_head = ctx.saved_tensors
        return grad_h * outer[0], grad_head[0] * outer[0] if grad_head else None, None, None, None


def top_k_kl(h: Tensor, head: torch.nn.Linear, names: Tensor, logs: Tensor, fast: bool) -> Tensor:
    """Mean KL per token over K + 1 outcomes, a scalar.

    Args:
        h: the student's last hidden states (batch, time, hidden), float32.
        head: its head.
        names: (batch, time, K) long, as in `TopKKL`.
        logs: (batch, time, K + 1).
        fast: bfloat16 for products that only carry the gradient.
    """
    h, weight = h.flatten(0, 1), head.weight
    if head.bias is not None:
        # A bias is one more column of the weight, for an input that is always 1.
        h = torch.nn.functional.pad(h, (0, 1), value=1.0)
        weight = torch.cat((weight, head.bias[:, None]), 1)
    return TopKKL.apply(h, weight, names.flatten(0, 1), logs.flatten(0, 1), fast)


@torch.no_grad()
def top_k_log_probs(t: Tensor, head: torch.nn.Linear, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of a teacher with last hidden states t (tokens, hidden).

    Returns:
        `names` (tokens, count) int32 and `logs` (tokens, count + 1) float32, as in `TopKKL`.
    """
    names, logs = [], []
    for part in t.split(SLICE):
        scores = head(part).float().log_softmax(-1)  # (slice, vocab)
        likely, ids = scores.topk(min(count, scores.shape[-1]), -1)
        rest = scores.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        names.append(ids.int())
        logs.append(torch.cat((likely, rest), -1))
    return torch.cat(names), torch.cat(logs)
