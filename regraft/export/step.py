"""Export: the same model as another class."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.checkpoint import Checkpoint
from ..core.lineage import cite_mixers
from ..core.step import step_entry
from .target import find_target


@dataclass(frozen=True)
class Export:
    """Write a model as another class that computes the same.

    Preserves: the logits.

    Refuses: models that the target cannot hold.
    """

    # Name of the target.
    to: str

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The model in the target's form."""
        target = find_target(self.to)
        target.check_holds(source)
        made = target.convert(source)
        if made is source:
            return source
        entry = step_entry(self)
        if papers := cite_mixers(source.config):
            entry["papers"] = papers
        if target.engines:
            entry["engines"] = list(target.engines)
        return replace(made, history=(*source.history, entry))
