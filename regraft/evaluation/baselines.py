"""What a linearized model is compared with: teacher, windows without training, parts of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..errors import explain_errors
from ..mixers.remix import Remix
from .perplexity import Candidate

TEACHER = "teacher"
WINDOW_ALL = "teacher, window in every layer"
WINDOW_KEPT = "same kept layers, window elsewhere"
UNTRAINED = "converted, before training"
MODEL = "model"
NO_LINEAR = "model, linear branch off"
WINDOW, SINKS = 64, 4  # tokens, of windows for models that have none
SCRATCH = "same architecture, from scratch"
# Rows that need no training. A trained model that is no better than a sliding window, which costs
# as little memory, has learned nothing.
ZERO_TOKEN = (WINDOW_ALL, WINDOW_KEPT, UNTRAINED)
ROWS = (TEACHER, *ZERO_TOKEN, SCRATCH, NO_LINEAR)


def variants(remix: Remix) -> dict[str, Remix | None]:
    """How each row that needs no training is made of the source, by name; None leaves it as it is.

    Args:
        remix: how the model was linearized. Windows are as wide as its own, or 64 tokens where it
            has none, and always see first tokens: 4 where its own see none.
    """
    size, sinks = remix.window or WINDOW, remix.sinks or SINKS
    everywhere = Remix(mixer="window", keep="none", window=size, sinks=sinks)
    elsewhere = Remix(mixer="window", keep=remix.keep, window=size, sinks=sinks)
    return {TEACHER: None, WINDOW_ALL: everywhere, WINDOW_KEPT: elsewhere, UNTRAINED: remix}


def zero_token(source: Checkpoint, remix: Remix) -> dict[str, Callable[[], Candidate]]:
    """Functions that build the rows that need no training, by name; the models stay in memory."""
    return {
        name: partial(build_candidate, source, variant) for name, variant in variants(remix).items()
    }


def build_candidate(source: Checkpoint, remix: Remix | None) -> Candidate:
    """The source's model, remixed or as it is."""
    if remix is None:
        return Candidate(modeling.load_stored(source))
    return Candidate(modeling.materialize(remix(source)))


def model_candidates(model: nn.Module) -> dict[str, Candidate]:
    """The model as it is and, where it has gated layers, with their linear branch switched off."""
    rows = {MODEL: Candidate(model)}
    if has_gate(getattr(model.config, "mixers", None)):
        rows[NO_LINEAR] = Candidate(model, partial(modeling.force_branch, model, "window"))
    return rows


def has_gate(mixers: Sequence[Mapping[str, Any] | None] | None) -> bool:
    """Whether one of a config's `mixers` has a linear branch and a window behind a gate."""
    return any((spec or {}).get("name") == "gated" for spec in mixers or ())


def remix_of(checkpoint: Checkpoint) -> Remix | None:
    """The Remix that made a checkpoint, from its lineage; None where none did."""
    for step in reversed(checkpoint.history):
        if step.get("step") == "Remix":
            with explain_errors("the step Remix in lineage.json is none", "make the model again"):
                return Remix(**step["arguments"])
    return None
