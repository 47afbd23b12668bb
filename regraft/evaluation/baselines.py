"""The rows a result is read against: teacher, zero-token windows, the untrained conversion, one branch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..mixers.remix import Remix
from .perplexity import Candidate

TEACHER = "teacher"
WINDOW_ALL = "teacher, window in every layer"
WINDOW_KEPT = "same kept layers, window elsewhere"
UNTRAINED = "converted, before training"
MODEL = "model"
NO_LINEAR = "model, linear branch off"
SCRATCH = "same architecture, from scratch"
ZERO_TOKEN = (WINDOW_ALL, WINDOW_KEPT, UNTRAINED)
ROWS = (TEACHER, *ZERO_TOKEN, SCRATCH, NO_LINEAR)


def variants(remix: Remix) -> dict[str, Remix | None]:
    """What to do to the source for the rows that need no training, by name; None leaves it as it is.

    The windows are `remix`'s own, or 64 with 4 sinks where it has none.
    """
    size, sinks = (remix.window, remix.sinks) if remix.window else (64, 4)
    everywhere = Remix(mixer="window", keep="none", window=size, sinks=sinks)
    elsewhere = Remix(mixer="window", keep=remix.keep, window=size, sinks=sinks)
    return {TEACHER: None, WINDOW_ALL: everywhere, WINDOW_KEPT: elsewhere, UNTRAINED: remix}


def zero_token(source: Checkpoint, remix: Remix) -> dict[str, Callable[[], Candidate]]:
    """Makers of the rows that need no training, by name; the models are built when called, in memory only."""
    return {
        name: partial(build_candidate, source, variant) for name, variant in variants(remix).items()
    }


def build_candidate(source: Checkpoint, remix: Remix | None) -> Candidate:
    """The source's model, remixed or as it is."""
    return Candidate(modeling.materialize(remix(source) if remix else source))


def model_candidates(model: nn.Module) -> dict[str, Candidate]:
    """The model's own rows: as it is and, where it has gated layers, with their linear branch switched off."""
    rows = {MODEL: Candidate(model)}
    if has_gate(getattr(model.config, "mixers", None)):
        rows[NO_LINEAR] = Candidate(model, partial(modeling.force_branch, model, "window"))
    return rows


def has_gate(mixers: Sequence[Mapping[str, Any] | None] | None) -> bool:
    """Whether a config's `mixers` have a gate somewhere."""
    return any((spec or {}).get("name") == "gated" for spec in mixers or ())


def remix_of(checkpoint: Checkpoint) -> Remix | None:
    """The Remix that made a checkpoint, from its lineage; None when there was none (a plain source)."""
    for step in reversed(checkpoint.history):
        if step.get("step") == "Remix":
            return Remix(**step["arguments"])
    return None
