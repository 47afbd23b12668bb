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
    def forward(ctx: Any, h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor, fast: bool) -> Tensor:
        """The loss, a scalar; the gradients are made on the way."""
        tokens = h.shape[0]
        total = h.new_zeros(())
        grad_h, grad_head = torch.empty_like(h), torch.zeros_like(head) if ctx.needs_input_grad[1] else None
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


def head_kl(h: Tensor, head: torch.nn.Linear, t: Tensor, teacher_head: torch.nn.Linear, fast: bool) -> Tensor:
    """Mean KL per token; h, t: (batch, time, hidden) float32. Heads without bias go the sliced way."""
    h, t = h.flatten(0, 1), t.flatten(0, 1)
    if head.bias is None and teacher_head.bias is None:
        return HeadKL.apply(h, head.weight, t, teacher_head.weight, fast)
    target, student = teacher_head(t).log_softmax(-1), head(h).log_softmax(-1)
    return (target.exp() * (target - student)).sum(-1).mean()
