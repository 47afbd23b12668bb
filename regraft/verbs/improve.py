"""Verbs that train, and whole experiments; heavy imports happen inside, so that `--help` is quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def train(
    model: str,
    out: str,
    data: str | None = None,
    tokens: int = 0,
    stage: Literal["align", "distil", "next"] = "distil",
    teacher: str | None = None,
    length: int = 1024,
    batch: int = 1,
    lr_new: float | None = None,
    lr_mixer: float | None = None,
    lr_body: float | None = None,
    seed: int = 0,
    json: bool = False,
) -> Outcome:
    """Train a linearized model; the same command resumes when OUT holds a run.

    Args:
        model: model directory
        out: directory to write
        data: text file or folder
        tokens: how many tokens to train on
        stage: align (layer outputs), distil (the teacher's distribution) or next (next token)
        teacher: the source, needed by align and distil
        length: tokens per row
        batch: rows per step
        lr_new: learning rate of weights that the source does not have
        lr_mixer: learning rate of inherited weights inside mixers
        lr_body: learning rate of all other weights, 0 to freeze them
        seed: of the data order
    """
    from .. import training
    from ..progress import Ticker
    from ..settings import Text
    from ..uptrain.stages import Stage

    if not data or tokens < 1:
        raise RegraftError(f"train needs --data PATH and --tokens N >= 1: got data {data!r} and tokens {tokens}")
    rates: dict[str, Any] = {"lr_new": lr_new, "lr_mixer": lr_mixer, "lr_body": lr_body}
    asked = Stage(stage, tokens, length, batch, **{key: rate for key, rate in rates.items() if rate is not None})
    with Ticker() as ticker:
        result = training.train_once(model, out, [Text(data)], asked, teacher, seed, ticker)

    def show(console: Console) -> None:
        console.print(
            f"{result['tokens']:,} tokens, {result['flops']:.3g} FLOPs, {result['seconds']:.0f} s; wrote {out}",
            soft_wrap=True,
            highlight=False,
        )

    return Outcome(result, show)


def run(recipe: str, out: str, overrides: dict[str, str] | None = None, json: bool = False) -> Outcome:
    """Run a whole experiment from a recipe, resumably, ending with the report; --key.sub VALUE overrides a field.

    Args:
        recipe: a YAML file, or file.py:function that returns a Recipe
        out: directory to write
    """
    from .. import experiment, settings

    return finished(experiment.run(settings.load(recipe, overrides or {}), out), out)


def demo(out: str = "demo-out", overrides: dict[str, str] | None = None, json: bool = False) -> Outcome:
    """Do the main job on the default model and text: linearize, train, measure, report, in 15 minutes."""
    from ..progress import Ticker

    with Ticker() as ticker:
        ticker.start("loading libraries")
        from .. import demo as demonstration

    return finished(demonstration.run(out, overrides or {}), out)


def finished(numbers: dict[str, Any], out: str) -> Outcome:
    """The end of an experiment: its table and where the page is."""

    def show(console: Console) -> None:
        from .. import evaluation

        evaluation.render(numbers["eval"], console)
        evaluation.render_bench(numbers["bench"], console)
        console.print(f"Report: {out}/report.html", soft_wrap=True, highlight=False)

    return Outcome(numbers, show)
