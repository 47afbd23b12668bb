"""Tensors that are computed when they are read, with a record of where their numbers come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Provenance:
    """Where a tensor's numbers come from."""

    # "copied", "grown" (computed from its sources), "broadcast" (repeated along axes), "zero" or
    # "fresh" (a constant or random).
    kind: str
    # Names of the source model's tensors that it is computed from; empty for "zero" and "fresh".
    sources: tuple[str, ...] = ()
    # How it is computed, for readers of lineage.json.
    note: str = ""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose values are computed by `read()`, at each call."""

    # Shape that `read` will return.
    shape: tuple[int, ...]
    # Dtype that `read` will return.
    dtype: torch.dtype
    # Where the numbers come from.
    provenance: Provenance
    # Computes the values, on the CPU.
    read: Callable[[], Tensor] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size when saved, in bytes."""
        return self.size * self.dtype.itemsize
