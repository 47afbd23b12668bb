"""What a scheme makes of a model's tensors, and scales that several numbers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import RegraftError
from ..computed_tensor import Compute, ComputedTensorEntry
from ..safetensors import TensorEntry


@dataclass
class Found:
    """What a scheme makes of the tensors in a model's files.

    Attributes:
        entries: what the files hold and nothing has claimed, by name.
        config: `quantization_config` of config.json.
        dtype: of what is computed, as safetensors writes it.
        computed: tensors that are computed, by name.
        dropped: what is stored and not used -> why.
    """

    entries: dict[str, TensorEntry]
    config: Mapping[str, Any]
    dtype: str
    computed: dict[str, TensorEntry] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def names(self, ending: str) -> list[str]:
        """What is before an ending, of all names that have it."""
        return [name[: -len(ending)] for name in self.entries if name.endswith(ending)]

    def add(
        self, name: str, shape: tuple[int, ...], pieces: Mapping[str, str], compute: Compute
    ) -> None:
        """Claim the pieces of a tensor.

        Args:
            name: of the tensor.
            shape: of it.
            pieces: names of what is stored, by what they are to the scheme. Those that are not
                there are left out.
            compute: the values from the pieces.
        """
        there = {role: one for role, one in pieces.items() if one in self.entries}
        stored = {role: self.entries[one] for role, one in there.items()}
        file = next(iter(stored.values())).file
        for one in there.values():
            del self.entries[one]
        self.computed[name] = ComputedTensorEntry(
            file, name, self.dtype, shape, pieces=stored, compute=compute
        )

    def require(self, name: str, needed_by: str) -> TensorEntry:
        """A stored tensor; RegraftError when it is not there."""
        if name not in self.entries:
            raise RegraftError(
                f"'{needed_by}' is quantised and has no '{name}' beside it: fetch the model again"
            )
        return self.entries[name]

    def drop(self, endings: tuple[str, ...], why: str) -> None:
        """Leave out what is stored under some endings."""
        for name in [name for name in self.entries if name.endswith(endings)]:
            self.dropped[name] = why
            del self.entries[name]


def spread_scale(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """A scale for every number of a matrix, or of several, from one for every block.

    Args:
        scale: (.., row blocks, column blocks), or one number, or one a row (.., rows, 1).
        shape: (.., rows, columns).
        block: rows and columns of a block; blocks at the end may be cut.
    """
    if scale.dim() < 2:
        return scale.reshape(-1, 1) if scale.numel() == shape[-2] else scale.reshape(())
    for axis, size in ((-2, block[0]), (-1, block[1])):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


def find_block(
    scale: tuple[int, ...], shape: tuple[int, ...], said: object = None
) -> tuple[int, int]:
    """Rows and columns of the blocks that scales stand for.

    Args:
        scale: shape of the scales, (.., row blocks, column blocks).
        shape: of the weight, (.., rows, columns).
        said: what the config says, which counts where it fits.
    """
    if len(scale) < 2:
        return 1, 1
    counts = scale[-2:]
    if isinstance(said, list | tuple) and len(said) == 2:
        sizes = [size for size in said if type(size) is int and size > 0]
        if [-(-shape[axis - 2] // size) for axis, size in enumerate(sizes)] == list(counts):
            return sizes[0], sizes[1]
    rows, columns = (-(-shape[axis] // max(counts[axis], 1)) for axis in (-2, -1))
    return rows, columns


def read_power_of_two(scale: Tensor) -> Tensor:
    """Scales in float32; bytes and E8M0 are exponents of two, with 127 for one."""
    if scale.dtype == torch.uint8:
        return (scale.float() - 127.0).exp2()
    return scale.float()
