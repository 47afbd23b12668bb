"""The sizes of a request, before it is known what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class WidthSizes:
    """Widths of a request; None leaves a size open, so that it stays or follows from the others."""

    hidden: int | None = None  # coordinates of the residual stream
    ffn: int | None = None  # neurons of an MLP
    heads: int | None = None  # query heads
    kv_heads: int | None = None  # key/value heads
    head_dim: int | None = None  # coordinates of a head


@dataclass(frozen=True)
class TargetSizes(WidthSizes):
    """Widths and depth of a request; None leaves a size open."""

    layers: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """The six sizes by name (int or None), as keyword arguments of a step."""
        return {field.name: getattr(self, field.name) for field in fields(TargetSizes)}
