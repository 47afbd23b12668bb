"""`regraft bench`: decoding and prefill speed and memory by context length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from .verb import Outcome, Verb, check_plot, write_plot

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.rows import VerifiedRow


def bench(
    model: str,
    against: str | None = None,
    lengths: str = "1k,4k,16k",
    steps: int = 32,
    batch: int = 1,
    skip_prefill: bool = False,
    verify: bool = False,
    dtype: str = "float32",
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
        skip_prefill: time decoding alone, behind copies of one token instead of a context
        verify: also time the model drafting for --against, which verifies, on held-out text
        dtype: of the model's weights (float32, bfloat16, float16, int8); --against keeps float32
        plot: also draw the rows into bench.svg in the current folder
        json: print one JSON object on standard output and nothing else
    """
    from .. import modeling
    from ..core.checkpoint import Checkpoint
    from ..evaluation import bench as benching
    from ..evaluation import evaluate as evaluation
    from ..evaluation.verified import bench_verified
    from ..io.units import parse_lengths
    from ..progress import Ticker
    from ..report import plots, tables

    if verify:
        check_verify(against, batch, skip_prefill)
    counts = parse_lengths(lengths)
    modeling.parse_decoding_dtype(dtype)  # an unknown one is refused before any work
    modeling.check_decoder(model, against)
    models = {"model": model} | ({"against": against} if against else {})
    for path in models.values():
        evaluation.check_context_lengths(
            Checkpoint.open(path), [count + (4 if verify else 1) * steps + 1 for count in counts]
        )
    if plot:
        check_plot("bench.svg")
        plots.figure(1, 1, 1)  # a missing matplotlib shows now, not at the end
    blocks: list[VerifiedRow] = []
    with Ticker() as ticker:
        ticker.start("bench")

        def report(done: int, total: int, words: str) -> None:
            ticker.update(done / total, words)

        rows = benching.bench(
            models,
            counts,
            steps,
            report,
            batch,
            not skip_prefill,
            dtypes={"model": dtype},
        )
        if verify and against:
            blocks = bench_verified(model, against, counts, steps, report, dtype)
            rows["verified"] = list(blocks)
    if plot:
        write_plot("bench.svg", plots.plot_speed(rows))
    data: dict[str, Any] = {"model": model, "rows": rows["model"]}
    if against:
        data |= {"source": against, "against": rows["against"]}

    def show(console: Console) -> None:
        console.print(tables.speed_table(rows))
        if verify:
            console.print(tables.acceptance_table(blocks))

    if verify:
        data["verified"] = blocks
    return Outcome(data, show)


def check_verify(against: str | None, batch: int, skip_prefill: bool) -> None:
    """RegraftError for flags with which --verify cannot be measured; arguments as of `bench`."""
    if against is None:
        raise RegraftError(f"--verify got --against {against}: give the source, which verifies")
    if batch != 1:
        raise RegraftError(f"--verify takes one row at a time: leave out --batch {batch}")
    if skip_prefill:
        raise RegraftError(
            f"--verify reads its context, '{against}' cannot verify copies of one token: leave out "
            "--skip-prefill"
        )


VERB = Verb(
    bench,
    examples=(
        "regraft bench MODEL --lengths 1k,4k,16k",
        "regraft bench MODEL --against SOURCE --lengths 1k,4k --verify",
    ),
)
