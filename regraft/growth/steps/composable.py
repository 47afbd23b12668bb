"""The six composable expansions by name, each one axis of Widen or a Deepen (Gesmundo & Maile,
arXiv 2308.06103).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.checkpoint import Checkpoint
from ...errors import RegraftError
from .deepen import Deepen
from .widen import Widen


@dataclass(frozen=True)
class GrowMLP:
    """Section 3.1: more neurons; the new ones' outputs are zero.

    Preserves: the logits. Refuses: fewer neurons, sizes the class cannot hold.
    """

    ffn: int
    how: str = "pad"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        return Widen(ffn=self.ffn, how=self.how)(source)


@dataclass(frozen=True)
class AddHeads:
    """Section 3.2: more heads (whole groups, more queries a group, or split key/value heads); new
    outputs are zero.

    Preserves: the logits. Refuses: numbers of heads the class cannot hold.
    """

    heads: int | None = None
    kv_heads: int | None = None
    how: str = "pad"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        return Widen(heads=self.heads, kv_heads=self.kv_heads, how=self.how)(source)


@dataclass(frozen=True)
class GrowHeadValues:
    """Section 3.3: more value coordinates a head.

    Preserves: the logits. Refuses: every family whose config has one width for queries, keys and
    values.
    """

    value_dim: int

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        raise RegraftError(
            _format_one_width_error(source, f"a value width of {self.value_dim}", self.value_dim)
        )


@dataclass(frozen=True)
class GrowQueryKeys:
    """Section 3.4: more query and key coordinates a head.

    Preserves: the logits. Refuses: every family whose config has one width for queries, keys and
    values.
    """

    key_dim: int

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        raise RegraftError(
            _format_one_width_error(
                source, f"a query and key width of {self.key_dim}", self.key_dim
            )
        )


@dataclass(frozen=True)
class GrowHeadDim:
    """Sections 3.3 and 3.4 together: wider heads, which is what classes with one head width can
    hold.

    Preserves: the logits. Refuses: rotary types and head widths that cannot keep their frequencies.
    """

    head_dim: int
    how: str = "pad"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        return Widen(head_dim=self.head_dim, how=self.how)(source)


@dataclass(frozen=True)
class GrowHidden:
    """Section 3.5: a wider residual stream.

    Preserves: the logits, with the norms' epsilon accounted for. Refuses: widths the class cannot
    hold exactly.
    """

    hidden: int
    how: str = "pad"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        return Widen(hidden=self.hidden, how=self.how)(source)


@dataclass(frozen=True)
class AddLayers:
    """Section 3.6: layers that add nothing yet.

    Preserves: the logits, bit for bit. Refuses: fewer layers.
    """

    layers: int
    how: str = "identity"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The deeper checkpoint."""
        return Deepen(self.layers, self.how)(source)


def _format_one_width_error(source: Checkpoint, what: str, size: int) -> str:
    return (
        f"{source.anatomy.family} has one head width for queries, keys and values, so {what} cannot"
        f" stand alone: use --head-dim {size} (the new query and key coordinates start without"
        " effect)"
    )
