"""Widen: more hidden coordinates, neurons, heads or head coordinates, and the same function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from ...errors import RegraftError
from .. import build
from ..operators import WIDTH, describe_operators, list_papers
from ..sizes import WidthSizes
from ..widened import widen_tensors


@describe_operators(WIDTH)
@dataclass(frozen=True)
class Widen(WidthSizes):
    """Grow axes together, every size given or derived from the others.

    `heads` are query heads. Heads' own coordinates are always padded. `fold`: how norms over a
    padded stream keep their mean square, `eps` (gains and epsilon), `stream` (everything written)
    or `auto` (`eps` where the class allows it). `noise` breaks the symmetry of copies without
    changing the function; None turns it on where copies would stay identical. `how` is one operator
    for all axes or one each ("hidden=tile,ffn=pad"):

    {operators}

    From {papers}; made exact on real classes.

    Preserves: the logits, up to rounding, except with {inexact}.
    Refuses: smaller sizes, and sizes the class cannot hold exactly; the message names the nearest
    that work.
    """

    how: str = "pad"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        widening = build.build_widening(source, self, self.how, self.fold, self.noise, self.seed)
        config = dict(widening.config)
        sizes = source.anatomy.solve(config)
        if sizes != dict(widening.sizes):
            raise RegraftError(
                f"{source.anatomy.family} config gives axes {sizes}, not {dict(widening.sizes)}:"
                " mend its table"
            )

        # The lineage names what users should know, and the papers behind the operators.
        step = step_entry(self)
        if notes := build.widening_notes(widening, self):
            step["notes"] = notes
        operators = dict.fromkeys(build.parse_width_operators(self.how).values())
        step["papers"] = list_papers(WIDTH, operators)
        return replace(
            source,
            config=config,
            sizes=sizes,
            tensors=widen_tensors(widening),
            history=(*source.history, step),
        )
