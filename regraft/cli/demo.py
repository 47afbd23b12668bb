"""`regraft demo`: the main job on a default model and text."""

from __future__ import annotations

from .outcome import Outcome, experiment_outcome


def demo(
    out: str = "demo-out", overrides: dict[str, str] | None = None, json: bool = False
) -> Outcome:
    """Do the main job on the default model and text: linearize, train, measure, report, in 15 minutes."""
    from ..progress import Ticker

    with Ticker() as ticker:
        ticker.start("loading libraries")
        from ..recipes import demo as demonstration

    return experiment_outcome(demonstration.run(out, overrides or {}), out)
