"""`regraft bench`: decoding and prefill speed and memory by context length."""

from __future__ import annotations

from typing import Any

from .verb import Outcome, Verb, check_plot, write_plot


def bench(
    model: str,
    against: str | None = None,
    lengths: str = "1k,4k,16k",
    steps: int = 32,
    batch: int = 1,
    skip_prefill: bool = False,
    plot: bool = False,
    json: bool = False,
) -> Outcome:
    """Measure decode and prefill speed, state bytes and peak memory by context length.

    Args:
        model: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        against: a second model measured beside it, say the source
        lengths: context lengths, such as 1k,4k,16k
        steps: decoding steps behind each median
        batch: rows decoded together; speeds and bytes are those of all rows
        skip_prefill: time decoding alone, from a cache filled with copies of one token instead of a
            context
        plot: also draw the rows into bench.svg in the current folder
        json: print one JSON object on standard output and nothing else
    """
    from .. import modeling
    from ..core.checkpoint import Checkpoint
    from ..evaluation import bench as benching
    from ..evaluation import evaluate as evaluation
    from ..io.units import parse_lengths
    from ..progress import Ticker
    from ..report import plots, tables

    counts = parse_lengths(lengths)
    modeling.check_decoder(model, against)
    models = {"model": model} | ({"against": against} if against else {})
    for path in models.values():
        evaluation.check_context_lengths(
            Checkpoint.open(path), [count + steps + 1 for count in counts]
        )
    if plot:
        check_plot("bench.svg")
        plots.figure(1, 1, 1)  # a missing matplotlib shows now, not at the end
    with Ticker() as ticker:
        ticker.start("bench")
        rows = benching.bench(
            models,
            counts,
            steps,
            lambda done, n, words: ticker.update(done / n, words),
            batch,
            not skip_prefill,
        )
    if plot:
        write_plot("bench.svg", plots.plot_speed(rows))
    data: dict[str, Any] = {"model": model, "rows": rows["model"]}
    if against:
        data |= {"source": against, "against": rows["against"]}
    return Outcome(data, lambda console: console.print(tables.speed_table(rows)))


VERB = Verb(
    bench,
    examples=(
        "regraft bench MODEL --lengths 1k,4k,16k",
        "regraft bench MODEL --against SOURCE --lengths 1k,4k --batch 16 --plot",
    ),
)
