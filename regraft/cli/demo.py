"""`regraft demo`: the main job on a default model and text."""

from __future__ import annotations

from .verb import Outcome, Verb, experiment_outcome


def demo(
    out: str = "demo-out", overrides: dict[str, str] | None = None, json: bool = False
) -> Outcome:
    """Do the main job on the default model and text: linearize, train, measure, report, in 15
    minutes.

    Args:
        out: directory to write
        json: print one JSON object on standard output and nothing else
    """
    from ..progress import Ticker

    with Ticker() as ticker:
        ticker.start("loading libraries")
        from ..recipes import demo as demonstration

    return experiment_outcome(demonstration.run(out, overrides or {}), out)


VERB = Verb(
    demo,
    examples=(
        "regraft demo",
        "regraft demo demo-out --minutes 30",
    ),
    resumes=True,
)
