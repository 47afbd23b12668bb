"""What norms of a class compute, found by trying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHIFT = 5.0  # added to inputs of a norm


@dataclass(frozen=True)
class NormKind:
    """What a norm does."""

    # Whether it subtracts the mean.
    mean: bool
    # Whether its gain is stored minus one.
    unit: bool


def probe_norm(module: Any, width: int) -> NormKind | None:
    """What a module does if it is a norm over its last dimension; None when it is none.

    A norm gives the same for inputs three times as large. One that subtracts the mean gives the
    same for inputs with a constant added; a gain stored minus one still acts when it is zero.

    Args:
        module: of a model.
        width: size of its inputs.
    """
    import torch

    if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv1d):
        return None
    generator = torch.Generator().manual_seed(0)
    given = 2 * torch.randn(7, width, generator=generator)
    try:
        with torch.no_grad():
            return _probe(module, given)
    except Exception:  # a module that takes something else
        return None


def _probe(module: Any, given: Any) -> NormKind | None:
    import torch

    result, larger = module(given), module(3 * given)
    if not torch.is_tensor(result) or result.shape != given.shape:
        return None
    if float((result - larger).abs().max()) > 1e-3 * float(result.abs().max()):
        return None

    mean = float((module(given + SHIFT) - result).abs().max()) < 1e-2
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        return NormKind(mean, unit=False)
    stored = weight.clone()
    weight.zero_()
    left = module(given) - (0 if bias is None else bias)
    weight.copy_(stored)
    return NormKind(mean, unit=float(left.abs().max()) > 1e-3)
