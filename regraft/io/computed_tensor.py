"""A tensor that is stored in several pieces and computed from them when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..errors import RegraftError, explain_errors
from .finite import check_finite
from .safetensors import DTYPES, TensorEntry

# The values of a tensor from those of its pieces, by what each piece is to the scheme.
Compute = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class ComputedTensorEntry(TensorEntry):
    """A tensor that is computed from what files hold when it is read; `dtype` is of the result."""

    # What is stored, by what it is to the scheme.
    pieces: Mapping[str, TensorEntry] = field(default_factory=dict)
    # Computes the values.
    compute: Compute | None = None

    def read(self) -> Tensor:
        """See `TensorEntry.read`; RegraftError when pieces do not fit each other too."""
        assert self.compute is not None
        stored = {
            role: replace(piece, allow_nonfinite=True).read() for role, piece in self.pieces.items()
        }
        what = f"cannot compute '{self.name}' from what '{self.file}' holds"
        with explain_errors(what, "fetch the model again"):
            value = self.compute(stored).to(DTYPES[self.dtype]).contiguous()
        if tuple(value.shape) != self.shape:
            raise RegraftError(
                f"{what}: it has the shape {list(value.shape)} where {list(self.shape)} was said: "
                "fetch the model again"
            )
        if not self.allow_nonfinite:
            advice = "fetch the file again; grow, linearize and train take --allow-nonfinite"
            check_finite(value, f"tensor '{self.name}' in '{self.file}'", advice)
        return value

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """See `TensorEntry.blocks`."""
        yield from self.read().split(rows)
