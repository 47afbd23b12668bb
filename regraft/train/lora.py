"""Low-rank additions to projections inside mixers (LoRA, arXiv 2106.09685), merged at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fsdp import distribute_like, local_part, replicate_like, shard_like

LOW_RANK = "low_rank"  # the name of the additions as a submodule of the model
SCALE = 2.0  # alpha / rank, as in LoLCATs (arXiv 2410.10254) and Liger (arXiv 2503.01496)


class LoraWeights(nn.Module):
    """W = base + 2 B A for each of some weights W (out, in), with A (rank, in) and B (out, rank).

    A is drawn like a linear layer's weight, B starts at zero. The weights W stay in the model's
    layers and get gradients. `pull_gradients` turns these into gradients of A and B by the chain
    rule, and `write_weights` computes W again after an update. So the model needs no other
    layers, and its file has nothing to unwrap. Where W is sharded by rows, B is too, and every
    process has the whole of A.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rank: int, generator: torch.Generator):
        """Draw the additions.

        Args:
            weights: W by name in the model.
            rank: rows of A, columns of B.
            generator: draws A.
        """
        super().__init__()
        self.weights = dict(weights)
        self.base, self.a, self.b = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

        for name, weight in weights.items():
            key = name.replace(".", "/")  # a module's parameter must have no dot in its name
            rows, columns = weight.shape
            drawn = torch.empty(rank, columns).uniform_(-1, 1, generator=generator)
            a = (drawn / math.sqrt(columns)).to(weight.dtype)
            b = torch.zeros(rows, rank, dtype=weight.dtype)
            self.base[key] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self.a[key] = nn.Parameter(replicate_like(a, weight))
            self.b[key] = nn.Parameter(distribute_like(b, weight))

    def trainable_ids(self) -> set[int]:
        """Ids of A and B."""
        return {id(parameter) for part in (self.a, self.b) for parameter in part.values()}

    def enable_gradients(self, names: list[str]) -> set[str]:
        """Let the weights W have gradients.

        Returns:
            The names that a checkpoint must hold: `names` of W, and those of base, A and B.
        """
        for weight in self.weights.values():
            weight.requires_grad_()
        return {*names, *(f"{LOW_RANK}.{name}" for name, _ in self.named_parameters())}

    def iter_matrices(self) -> Iterator[tuple[nn.Parameter, ...]]:
        """(W, base, A, B) of each weight."""
        return zip(
            self.weights.values(), self.base.values(), self.a.values(), self.b.values(), strict=True
        )

    def pull_gradients(self) -> None:
        """Turn the gradient G of each W into those of A and B, and drop it.

        From W = base + s B A: dA = s B^T G, dB = s G A^T.
        """
        for weight, _, a, b in self.iter_matrices():
            if weight.grad is not None:
                a.grad = replicate_like(SCALE * b.detach().mT @ weight.grad, weight)
                b.grad = SCALE * weight.grad @ a.detach().mT
                weight.grad = None

    @torch.no_grad()
    def write_weights(self) -> None:
        """Compute each W from base, A and B."""
        for weight, base, a, b in self.iter_matrices():
            weight.copy_(base + SCALE * b @ a)


def attach_lora(
    model: PreTrainedModel, names: list[str], rank: int, seed: int, stored: dict[str, Tensor]
) -> LoraWeights:
    """Add low-rank additions to a model, as its submodule `low_rank`.

    Args:
        model: the model.
        names: its weights that get additions.
        rank: of the additions.
        seed: for A.
        stored: tensors of a checkpoint; base, A and B are taken from it, and out of it, where it
            has them.
    """
    weights = {name: model.get_parameter(name) for name in names}
    lora = LoraWeights(weights, rank, torch.Generator().manual_seed(seed))
    model.add_module(LOW_RANK, lora)

    # A resumed stage goes on from its base: the model's weights already have the additions in them.
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if (key := f"model/{LOW_RANK}.{name}") in stored:
                local_part(parameter).copy_(shard_like(stored.pop(key), parameter))
    lora.write_weights()
    return lora


def detach_lora(model: PreTrainedModel) -> set[str]:
    """Leave the weights as they are now and drop the additions; returns the names dropped."""
    names = {f"{LOW_RANK}.{name}" for name, _ in model.get_submodule(LOW_RANK).named_parameters()}
    delattr(model, LOW_RANK)
    return names
