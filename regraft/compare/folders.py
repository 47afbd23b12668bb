"""Where a comparison keeps its runs."""

from __future__ import annotations

from pathlib import Path

from ..train.output import WORK
from .recipe import Comparison

DONE = "done.json"  # of a finished run
FITTING = WORK / "fitting"  # folder of a fitted map on its way
GROWN = WORK / "grown"  # what a fitted map gives, until it is trained


def source_folder(recipe: Comparison, out: Path, name: str, seed: int) -> Path:
    """Where a source is: its own directory when it was given as one."""
    source = recipe.sources()[name]
    return Path(source) if isinstance(source, str) else out / "sources" / name / str(seed)


def arm_folder(out: Path, name: str, seed: int) -> Path:
    """Where an arm's run with one seed is kept."""
    return out / "arms" / name / str(seed)
