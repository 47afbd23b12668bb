"""`regraft run`: a whole experiment from a recipe."""

from __future__ import annotations

from .verb import Outcome, Verb, experiment_outcome


def run(
    recipe: str,
    out: str,
    track: str | None = None,
    spike_factor: float = 1.5,
    overrides: dict[str, str] | None = None,
    json: bool = False,
) -> Outcome:
    """Run a whole experiment from a recipe, resumably, ending with the report; --key.sub VALUE
    overrides a field.

    Args:
        recipe: a YAML file, or file.py:function that returns a Recipe
        out: directory to write
        track: send the rows of metrics.jsonl to trackio, wandb or tensorboard too, or to a list of
            them
        spike_factor: stop when the loss stays above this many times its running median; 0: never
        json: print one JSON object on standard output and nothing else
    """
    from ..recipes import run as experiment
    from ..recipes import schema as settings
    from ..train import trackers
    from ..train.monitor import MonitorConfig

    trackers.import_trackers(track)
    return experiment_outcome(
        experiment.run_recipe(
            settings.load(recipe, overrides or {}), out, MonitorConfig(track, spike_factor)
        ),
        out,
    )


VERB = Verb(
    run,
    examples=(
        "regraft run recipe.yaml OUT",
        "regraft run recipe.yaml OUT --remix.keep none --stages.1.tokens 500000",
    ),
    resumes=True,
    distributed=True,
)
