"""Low-rank additions to the projections inside mixers (LoRA, Hu et al., arXiv 2106.09685), merged when a stage ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fsdp import distribute_like, local_part, replicate_like, shard_like

LOW_RANK = "low_rank"  # the name of the additions as a submodule of the model
SCALE = 2.0  # alpha / rank, as LoLCATs (arXiv 2410.10254) and Liger (arXiv 2503.01496) have it


class LoraWeights(nn.Module):
    """W = base + 2 B A for each of `weights`, (out, in) with A (rank, in) drawn like a linear layer's and B at zero.

    The weights stay where they are and get gradients; `pull` hands these to A and B by the chain rule, `push` writes
    the weights anew after a step. So the model needs no other layers, and its file has nothing to unwrap. Where the
    weights are sharded by rows B is too, and every process has the whole of A.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rank: int, generator: torch.Generator):
        super().__init__()
        self.weights = dict(weights)
        self.base, self.a, self.b = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, weight in weights.items():
            key = name.replace(".", "/")
            rows, columns = weight.shape
            drawn = torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(
                columns
            )
            self.base[key] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self.a[key] = nn.Parameter(replicate_like(drawn.to(weight.dtype), weight))
            self.b[key] = nn.Parameter(
                distribute_like(torch.zeros(rows, rank, dtype=weight.dtype), weight)
            )

    def trainable_ids(self) -> set[int]:
        """Identities of A and B."""
        return {id(parameter) for part in (self.a, self.b) for parameter in part.values()}

    def enable_gradients(self, names: list[str]) -> set[str]:
        """Let the weights have gradients; the names of all that a saved state must hold."""
        for weight in self.weights.values():
            weight.requires_grad_()
        return {*names, *(f"{LOW_RANK}.{name}" for name, _ in self.named_parameters())}

    def iter_matrices(self) -> Iterator[tuple[nn.Parameter, ...]]:
        """(weight, base, A, B) of each weight."""
        return zip(
            self.weights.values(), self.base.values(), self.a.values(), self.b.values(), strict=True
        )

    def pull_gradients(self) -> None:
        """Gradients of the weights become those of A and B."""
        for weight, _, a, b in self.iter_matrices():
            if weight.grad is not None:
                a.grad = replicate_like(SCALE * b.detach().mT @ weight.grad, weight)
                b.grad = SCALE * weight.grad @ a.detach().mT
                weight.grad = None

    @torch.no_grad()
    def write_weights(self) -> None:
        """The weights from base, A and B."""
        for weight, base, a, b in self.iter_matrices():
            weight.copy_(base + SCALE * b @ a)


def attach_lora(
    model: PreTrainedModel, names: list[str], rank: int, seed: int, kept: dict[str, Tensor]
) -> LoraWeights:
    """Put low-rank additions to the weights of these names beside the model, as they were in `kept`, a saved state."""
    weights = {name: model.get_parameter(name) for name in names}
    low = LoraWeights(weights, rank, torch.Generator().manual_seed(seed))
    model.add_module(LOW_RANK, low)
    with torch.no_grad():
        for name, parameter in low.named_parameters():
            if (key := f"model/{LOW_RANK}.{name}") in kept:
                local_part(parameter).copy_(shard_like(kept.pop(key), parameter))
    low.write_weights()
    return low


def detach_lora(model: PreTrainedModel) -> set[str]:
    """Leave the weights as they are now and take the additions away; the names that are gone."""
    gone = {f"{LOW_RANK}.{name}" for name, _ in model.get_submodule(LOW_RANK).named_parameters()}
    delattr(model, LOW_RANK)
    return gone
