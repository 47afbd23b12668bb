"""Verbs that measure a model and let it speak; heavy imports happen inside, so that `--help` is quick."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outcome import Outcome

if TYPE_CHECKING:
    pass


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
    from .. import evaluation, hosts
    from ..progress import Ticker

    hosts.wants_decoder(model, baseline)
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
    from .. import generate as generating
    from .. import hosts

    def say(piece: str) -> None:
        print(piece, end="", flush=True)

    hosts.wants_decoder(model)
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
    from .. import evaluation, hosts
    from ..evals import bench as benching
    from ..progress import Ticker

    counts = benching.parse_lengths(lengths)
    hosts.wants_decoder(model, against)
    models = {"model": model} | ({"against": against} if against else {})
    with Ticker() as ticker:
        ticker.start("bench")
        rows = benching.bench(models, counts, steps, lambda done, n, note: ticker.update(done / n, note))
    if plot:
        from .. import plots

        Path("bench.svg").write_bytes(plots.lengths(rows))
        print("regraft: wrote bench.svg", file=sys.stderr)
    data: dict[str, Any] = {"model": model, "rows": rows["model"]}
    if against:
        data |= {"source": against, "against": rows["against"]}
    return Outcome(data, lambda console: evaluation.render_bench(rows, console))
