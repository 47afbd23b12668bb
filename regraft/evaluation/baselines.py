"""What a linearized model is compared with: teacher, windows without training, parts of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..errors import explain_errors
from ..mixers.registry import mixer_class
from ..mixers.remix import Remix
from ..mixers.window import Window
from ..modeling.layer_kinds import attention_of, mixers_of
from .perplexity import Candidate

TEACHER = "teacher"
WINDOW_ALL = "teacher, window in every layer"
WINDOW_KEPT = "same kept layers, window elsewhere"
UNTRAINED = "converted, before training"
MODEL = "model"
NO_LINEAR = "model, linear branch off"
WINDOW, SINKS = 64, 4  # tokens, least width and first tokens for models without a window
SCRATCH = "same architecture, from scratch"
# Rows that need no training. A trained model that is no better than a sliding window, which costs
# as little memory, has learned nothing.
ZERO_TOKEN = (WINDOW_ALL, WINDOW_KEPT, UNTRAINED)
ROWS = (TEACHER, *ZERO_TOKEN, SCRATCH, NO_LINEAR)


def variants(source: Checkpoint, remix: Remix) -> dict[str, Remix | None]:
    """How each row that needs no training is made of the source, by name; None leaves it as it is.

    Windows hold as much state as a linearized layer holds: its own window and, in more tokens, its
    linear branch. They always see first tokens: 4 where its own window sees none.

    Args:
        source: the teacher.
        remix: how the model was linearized.
    """
    sinks = remix.sinks or SINKS
    size = same_state_window(source, remix, sinks)
    everywhere = Remix(mixer="window", keep="none", window=size, sinks=sinks)
    elsewhere = Remix(mixer="window", keep=remix.keep, window=size, sinks=sinks)
    return {TEACHER: None, WINDOW_ALL: everywhere, WINDOW_KEPT: elsewhere, UNTRAINED: remix}


def same_state_window(source: Checkpoint, remix: Remix, sinks: int) -> int:
    """Tokens of a window whose state is as large as that of the first linearized layer, and at
    least as wide as the layer's own window, or 64 where it has none.

    A linear mixer alone holds much less than 64 tokens; a window that narrow would be no opponent.
    """
    least = remix.window or WINDOW
    after = remix(source)
    for layer, spec in enumerate(mixers_of(after)):
        if spec is not None:
            attention = attention_of(after, layer)
            numbers = mixer_class(spec["name"]).state_size(attention, spec)
            one, two = (
                Window.state_size(attention, {"name": "window", "window": width, "sinks": sinks})
                for width in (1, 2)
            )
            return max(least, (numbers - one) // (two - one) + 1)
    return least


def zero_token(source: Checkpoint, remix: Remix) -> dict[str, Callable[[], Candidate]]:
    """Functions that build the rows that need no training, by name; the models stay in memory."""
    return {
        name: partial(build_candidate, source, variant)
        for name, variant in variants(source, remix).items()
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
