"""KL divergence through the head, a slice of tokens at a time: the (tokens, vocab) matrices never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE = 256


class HeadKL(torch.autograd.Function):
    """Mean over tokens of KL(softmax(t U^T) || softmax(h W^T)), with its gradient (softmax - target) / tokens.

    h, t: (tokens, hidden) student's and teacher's last hidden states; W, U: (vocab, hidden) their heads. The products
    that give the loss are float32; with `fast` those that only carry the gradient are bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor, fast: bool
    ) -> Tensor:
        """The loss, a scalar; the gradients are made on the way."""
        tokens = h.shape[0]
        total = h.new_zeros(())
        grad_h, grad_head = (
            torch.empty_like(h),
            torch.zeros_like(head) if ctx.needs_input_grad[1] else None,
        )
        light = torch.bfloat16 if fast else h.dtype
        light_head = head.to(light)
        for start in range(0, tokens, SLICE):
            part = slice(start, start + SLICE)
            target = (t[part] @ teacher_head.mT).log_softmax(-1)
            student = (h[part] @ head.mT).log_softmax(-1)
            gap = target - student
            weight = target.exp_()
            total += torch.dot(weight.flatten(), gap.flatten())
            grad = student.exp_().sub_(weight).div_(tokens).to(light)
            grad_h[part] = (grad @ light_head).to(h.dtype)
            if grad_head is not None:
                grad_head += (grad.mT @ h[part].to(light)).to(head.dtype)
        ctx.save_for_backward(grad_h, *([grad_head] if grad_head is not None else []))
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` made."""
        grad_h, *grad_head = ctx.saved_tensors
        return grad_h * outer[0], grad_head[0] * outer[0] if grad_head else None, None, None, None


def head_kl(
    h: Tensor, head: torch.nn.Linear, t: Tensor, teacher_head: torch.nn.Linear, fast: bool
) -> Tensor:
    """Mean KL per token; h, t: (batch, time, hidden) float32. Heads without bias go the sliced way."""
    h, t = h.flatten(0, 1), t.flatten(0, 1)
    if head.bias is None and teacher_head.bias is None:
        return HeadKL.apply(h, head.weight, t, teacher_head.weight, fast)
    target, student = teacher_head(t).log_softmax(-1), head(h).log_softmax(-1)
    return (target.exp() * (target - student)).sum(-1).mean()


class TopKKL(torch.autograd.Function):
    """Mean over tokens of the KL over K + 1 outcomes: the K tokens named for each position, and all others as one.

    h: (tokens, hidden), head: (vocab, hidden); names (tokens, K) long; logs (tokens, K + 1): the teacher's logarithms
    of their probabilities and, last, of what is left. The gradient to the logits is softmax - target for the named
    tokens, and softmax times 1 - (target's rest / softmax's rest) for the others. K = vocab is the full KL.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, names: Tensor, logs: Tensor, fast: bool
    ) -> Tensor:
        """The loss, a scalar; the gradients are made on the way."""
        tokens = h.shape[0]
        total = h.new_zeros(())
        grad_h, grad_head = (
            torch.empty_like(h),
            torch.zeros_like(head) if ctx.needs_input_grad[1] else None,
        )
        light = torch.bfloat16 if fast else h.dtype
        light_head = head.to(light)
        for start in range(0, tokens, SLICE):
            part = slice(start, start + SLICE)
            place, target = names[part], logs[part]
            student = (h[part] @ head.mT).log_softmax(-1)
            named = student.gather(-1, place)
            rest = student.scatter(-1, place, -torch.inf).logsumexp(-1, keepdim=True)
            weight = target.exp()
            gap = target - torch.cat((named, rest), -1)
            total += torch.where(weight > 0, weight * gap, 0.0).sum()
            ratio = torch.where(weight[:, -1:] > 0, (target[:, -1:] - rest).exp(), 0.0)
            grad = student.exp_().mul_(1 - ratio).scatter_(-1, place, named.exp() - weight[:, :-1])
            grad = grad.div_(tokens).to(light)
            grad_h[part] = (grad @ light_head).to(h.dtype)
            if grad_head is not None:
                grad_head += (grad.mT @ h[part].to(light)).to(head.dtype)
        ctx.save_for_backward(grad_h, *([grad_head] if grad_head is not None else []))
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` made."""
        grad_h, *grad_head = ctx.saved_tensors
        return grad_h * outer[0], grad_head[0] * outer[0] if grad_head else None, None, None, None


def top_k_kl(h: Tensor, head: torch.nn.Linear, names: Tensor, logs: Tensor, fast: bool) -> Tensor:
    """Mean KL per token over K + 1 outcomes; h: (batch, time, hidden) float32, names (batch, time, K) and logs (batch,
    time, K + 1) as in `TopKL`. A head with a bias is taken as one of hidden + 1.
    """
    h, weight = h.flatten(0, 1), head.weight
    if head.bias is not None:
        h, weight = (
            torch.nn.functional.pad(h, (0, 1), value=1.0),
            torch.cat((weight, head.bias[:, None]), 1),
        )
    return TopKKL.apply(h, weight, names.flatten(0, 1), logs.flatten(0, 1), fast)


@torch.no_grad()
def top_k_log_probs(t: Tensor, head: torch.nn.Linear, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of a teacher with last hidden states t (tokens, hidden): names (tokens, count) int32
    and logs (tokens, count + 1) float32 as `top_kl` takes them.
    """
    names, logs = [], []
    for part in t.split(SLICE):
        scores = head(part).float().log_softmax(-1)
        likely, place = scores.topk(min(count, scores.shape[-1]), -1)
        rest = scores.scatter(-1, place, -torch.inf).logsumexp(-1, keepdim=True)
        names.append(place.int())
        logs.append(torch.cat((likely, rest), -1))
    return torch.cat(names), torch.cat(logs)
