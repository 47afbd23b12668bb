"""`regraft eval`: perplexity, benchmarks and recall beside the baselines."""

from __future__ import annotations

from ..errors import RegraftError
from .verb import Outcome, Verb, check_plot, check_unused_flags, write_plot


def evaluate(
    model: str,
    data: str | None = None,
    baseline: str | None = None,
    scratch: str | None = None,
    windows: int = 16,
    length: int = 1024,
    tasks: str | None = None,
    task_data: str | None = None,
    limit: int | None = None,
    shots: int = 0,
    lengths: str = "512,1k,2k",
    batch: int = 8,
    positions: bool = False,
    plot: bool = False,
    bos: bool = False,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Measure perplexity per token and per byte, or benchmarks and recall, beside the baselines of
    a source.

    Args:
        model: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        data: text file or folder (default: the held-out part of Python's own documentation)
        baseline: the source: adds its row, the zero-token windows, the untrained conversion, KL to
            it
        scratch: the same architecture trained from scratch: adds its row
        windows: number of windows, spread evenly over the text
        length: tokens per window
        tasks: instead of perplexity, benchmarks (hellaswag,piqa,...) and recall
            (passkey,needle,mqar), by commas
        task_data: folder of the benchmarks' jsonl files
        limit: questions of each benchmark, spread evenly, and contexts of each recall (default:
            all, and 32)
        shots: examples before each question, where a benchmark has a file of them (mmlu)
        lengths: context lengths of recall, such as 512,1k,2k
        batch: rows at a time in benchmarks and recall
        positions: also, or alone, perplexity by tokens of context over --windows documents of
            --length tokens
        plot: also draw positions.svg in the current folder
        bos: windows begin with the tokenizer's BOS token, in the place of their first, as they do
            for models with sink_window
        dtype: of the model's weights (float32, bfloat16, float16, int8); baselines keep float32
        trust_remote_code: run the Python files beside the tokenizer, if it needs them
        json: print one JSON object on standard output and nothing else
    """
    if plot and not positions:
        raise RegraftError(
            f"--plot draws perplexity by position (positions is {positions}): add --positions"
        )
    if tasks is None:
        names = ("task_data", "limit", "shots", "lengths", "batch")
        check_unused_flags(
            evaluate,
            locals(),
            names,
            "it is for benchmarks and recall, so name some, as in --tasks hellaswag,passkey",
        )
    from .. import modeling
    from ..evaluation import evaluate as evaluation
    from ..io.units import parse_lengths
    from ..progress import Ticker
    from ..report import html, plots
    from ..report import tables as printing

    weights = modeling.parse_decoding_dtype(dtype)
    modeling.check_decoder(model, baseline, scratch)
    if plot:
        check_plot("positions.svg")
        plots.figure(1, 1, 1)  # a missing matplotlib shows now, not at the end
    with Ticker() as ticker:
        ticker.start(f"evaluating {model}")
        if tasks is None and not positions:
            found = evaluation.evaluate(
                model,
                baseline,
                data,
                windows,
                length,
                lambda done, total: ticker.update(done / total),
                scratch,
                trust_remote_code,
                bos,
                weights,
            )
        else:
            suite = evaluation.build_suite(
                model,
                tasks.split(",") if tasks else [],
                data=data,
                windows=(windows, length) if positions else None,
                folder=task_data,
                limit=limit,
                shots=shots,
                lengths=parse_lengths(lengths),
                batch=batch,
                trust_remote_code=trust_remote_code,
                bos=bos,
            )
            found = evaluation.benchmark(model, suite, baseline, scratch, ticker.update, weights)
    if plot:
        write_plot("positions.svg", plots.plot_positions(html.eval_rows(found)))
    return Outcome(found, lambda console: printing.print_evaluation(found, console))


VERB = Verb(
    evaluate,
    examples=(
        "regraft eval MODEL --baseline SOURCE",
        (
            "regraft eval MODEL --baseline SOURCE --tasks hellaswag,passkey --task-data DIR"
            " --limit 300"
        ),
    ),
    sections={
        "baselines": (
            "baseline",
            "scratch",
        ),
        "perplexity": (
            "data",
            "windows",
            "length",
            "positions",
            "plot",
            "bos",
        ),
        "benchmarks and recall": (
            "tasks",
            "task_data",
            "limit",
            "shots",
            "lengths",
            "batch",
        ),
        "output": (
            "dtype",
            "trust_remote_code",
            "json",
        ),
    },
)
