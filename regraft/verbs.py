"""What each verb of the command line does; heavy imports happen inside, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RegraftError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Outcome:
    """The JSON object, how to show it to a person, the exit code."""

    data: dict[str, Any]
    show: Callable[[Console], None] | None = None
    code: int = 0


def plan(
    source: str,
    mixer: str | None = None,
    keep: str = "every:4",
    window: int = 64,
    sinks: int = 4,
    options: dict[str, Any] | None = None,
    context: int = 16384,
    json: bool = False,
) -> Outcome:
    """Show the weight map, totals and memory of a change; reads no weights.

    Args:
        source: model directory or GGUF file
        mixer: linearize with this mixer; without it the model as it is (for regraft's own output: what was done)
        keep: layers that keep softmax attention: every:N, a list such as 0,7,14, all or none
        window: width of the gated window branch, 0 for none
        sinks: first tokens that the window always sees
        options: the mixer's own options as JSON, such as {"grouped": false}
        context: tokens for which state sizes are given
    """
    from . import plan as planning
    from .checkpoint import Checkpoint
    from .steps.remix import Remix

    before = Checkpoint.open(source)
    after = Remix(mixer, keep, window, sinks, options=options or {})(before) if mixer else before
    made = planning.Plan.of(before, after, context=context)
    return Outcome(made.json(), lambda console: planning.render(made, console))


def linearize(
    source: str,
    out: str,
    mixer: str = "gated_deltanet",
    keep: str = "every:4",
    window: int = 64,
    sinks: int = 4,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> Outcome:
    """Replace attention layers by linear-cost mixers and save the model.

    Args:
        source: model directory or GGUF file
        out: directory to write
        mixer: gated_deltanet, supra or window
        keep: layers that keep softmax attention: every:N, a list such as 0,7,14, all or none
        window: width of the gated window branch, 0 for the linear mixer alone
        sinks: first tokens that the window always sees
        seed: of fresh weights
        options: the mixer's own options as JSON, such as {"grouped": false}
    """
    from . import plan as planning
    from .checkpoint import Checkpoint
    from .steps.remix import Remix

    before = Checkpoint.open(source)
    after = Remix(mixer, keep, window, sinks, seed, options or {})(before)
    made = planning.Plan.of(before, after)
    after.save(out, overwrite=overwrite)

    def show(console: Console) -> None:
        planning.render(made, console)
        console.print(f"Wrote {out}. Next: regraft check {source} {out}", soft_wrap=True, highlight=False)

    return Outcome(made.json() | {"out": out}, show)


def receipts(source: str, out: str, json: bool = False) -> Outcome:
    """Receipts: every tensor accounted for, step-0 difference, parallel against recurrent; exit 1 if one does not hold.

    Args:
        source: the model that was changed
        out: what came of it
    """
    from . import receipts as proofs

    found = proofs.check(source, out)
    return Outcome(found, lambda console: proofs.render(found, console), 0 if found["holds"] else 1)


def evaluate(
    model: str,
    data: str | None = None,
    baseline: str | None = None,
    windows: int = 16,
    length: int = 1024,
    json: bool = False,
) -> Outcome:
    """Measure perplexity per token and per byte, with the baselines of a source.

    Args:
        model: model directory or GGUF file
        data: text file or folder (default: the held-out part of Python's own documentation)
        baseline: the source: adds its row, the zero-token windows, the untrained conversion, KL to it
        windows: number of windows, spread evenly over the text
        length: tokens per window
    """
    from . import evaluation
    from .progress import Ticker

    with Ticker() as ticker:
        ticker.start(f"evaluating {model}")
        table = evaluation.evaluate(model, baseline, data, windows, length, lambda d, n: ticker.update(d / n))
    return Outcome(table, lambda console: evaluation.render(table, console))


def generate(
    model: str,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    json: bool = False,
) -> Outcome:
    """Continue a prompt, streaming the text; the state's size goes to standard error.

    Args:
        model: model directory or GGUF file
        prompt: text to continue
        tokens: at most this many new tokens
        temperature: 0 is greedy
        seed: of the sampling
    """
    from . import generate as generating
    from . import hosts

    def say(piece: str) -> None:
        print(piece, end="", flush=True)

    loaded = hosts.load(model)
    tokenizer = hosts.load_tokenizer(model)
    result = generating.generate(loaded, tokenizer, prompt, tokens, temperature, seed, chat, None if json else say)
    if not json:
        print()
    print(f"regraft: {result.size()}", file=sys.stderr)
    return Outcome(asdict(result))


def bench(
    model: str,
    against: str | None = None,
    lengths: str = "1k,4k,16k",
    steps: int = 32,
    plot: bool = False,
    json: bool = False,
) -> Outcome:
    """Measure decode and prefill speed, state bytes and peak memory by context length.

    Args:
        model: model directory or GGUF file
        against: a second model measured beside it, say the source
        lengths: context lengths, such as 1k,4k,16k
        steps: decoding steps behind each median
    """
    from . import evaluation
    from .evals import bench as benching
    from .progress import Ticker

    counts = benching.parse_lengths(lengths)
    models = {"model": model} | ({"against": against} if against else {})
    with Ticker() as ticker:
        ticker.start("bench")
        rows = benching.bench(models, counts, steps, lambda done, n, note: ticker.update(done / n, note))
    if plot:
        from . import plots

        Path("bench.svg").write_bytes(plots.lengths(rows))
        print("regraft: wrote bench.svg", file=sys.stderr)
    data: dict[str, Any] = {"model": model, "rows": rows["model"]}
    if against:
        data |= {"source": against, "against": rows["against"]}
    return Outcome(data, lambda console: evaluation.render_bench(rows, console))


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
    from . import training
    from .progress import Ticker
    from .settings import Text
    from .uptrain.stages import Stage

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
    from . import experiment, settings

    return finished(experiment.run(settings.load(recipe, overrides or {}), out), out)


def demo(out: str = "demo-out", overrides: dict[str, str] | None = None, json: bool = False) -> Outcome:
    """Do the main job on the default model and text: linearize, train, measure, report, in 15 minutes."""
    from .progress import Ticker

    with Ticker() as ticker:
        ticker.start("loading libraries")
        from . import demo as demonstration

    return finished(demonstration.run(out, overrides or {}), out)


def finished(numbers: dict[str, Any], out: str) -> Outcome:
    """The end of an experiment: its table and where the page is."""

    def show(console: Console) -> None:
        from . import evaluation

        evaluation.render(numbers["eval"], console)
        evaluation.render_bench(numbers["bench"], console)
        console.print(f"Report: {out}/report.html", soft_wrap=True, highlight=False)

    return Outcome(numbers, show)
