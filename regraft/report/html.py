"""One self-contained HTML page about a run, and the same numbers as report.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

from ..core.lineage import Lineage
from ..errors import explain_errors
from ..evaluation.baselines import ZERO_TOKEN
from ..evaluation.rows import SuiteRow
from ..io.files import read_json_if_exists, read_json_lines, write_json, write_text
from ..io.schema import Measured
from ..io.yaml_loader import read_yaml
from ..train.ledger import build_ledger, read_start_costs
from ..train.metrics import FILE as METRICS
from ..train.metrics import MetricsRow
from . import plots
from .headline import headlines
from .templates import render
from .units import format_bytes, format_duration, format_flops, format_number, format_speed


class PlanFacts(TypedDict):
    """What the page reads of plan.json."""

    parameters: int


class SpentTime(TypedDict):
    """What the page reads of time.json."""

    seconds: float
    notes: NotRequired[list[str]]  # what a time limit left out


class ReportedRow(SuiteRow, total=False):
    """A row of eval.json; the other keys are there where perplexity was measured."""

    perplexity: Measured
    byte_perplexity: Measured
    kl: Measured | None
    tokens: int
    windows: int


class ReportedEvaluation(ReportedRow, total=False):
    """eval.json: the model's own row and its baselines."""

    model: str
    baselines: dict[str, ReportedRow]


class ReportedSpeed(TypedDict, total=False):
    """A row of bench.json; older ones have fewer keys."""

    length: Required[int]
    batch: int
    decode_tok_s: float | None
    prefill_tok_s: float | None
    state_bytes: int
    converted_bytes: int
    kept_bytes: int
    peak_bytes: int | None
    extrapolated: list[str]


class ReportedSample(TypedDict):
    """An entry of samples.json."""

    prompt: str
    teacher: str
    student: str


# What a run writes, NAME.json, and what is read of it.
FILES: dict[str, Any] = {
    "plan": PlanFacts,
    "eval": ReportedEvaluation,
    "bench": dict[str, list[ReportedSpeed]],
    "samples": list[ReportedSample],
    "time": SpentTime,
    "lineage": Lineage,
}
LEADS = "The model's lead on the same questions, percent ± error"


def collect(directory: Path) -> dict[str, Any]:
    """The report's numbers from a run directory: whatever its phases have written."""
    numbers: dict[str, Any] = {
        name: read_json_if_exists(directory / f"{name}.json", kind) for name, kind in FILES.items()
    }
    recipe = directory / "recipe.yaml"
    numbers["recipe"] = read_yaml(recipe, f"'{recipe}'") if recipe.exists() else None
    metrics = read_json_lines(directory / METRICS, MetricsRow)
    return numbers | {"ledger": build_ledger(metrics, read_start_costs(directory))}


def write(directory: Path) -> Path:
    """Write report.html and report.json into a run directory; returns the page's path."""
    numbers = collect(directory)
    # Files that are as they should be one by one may still not belong together.
    with explain_errors(f"no page can be made of '{directory}'", "run it again in another folder"):
        page = render_page(numbers, read_json_lines(directory / METRICS, MetricsRow))
    write_json(directory / "report.json", numbers)
    write_text(directory / "report.html", page)
    return directory / "report.html"


@dataclass(frozen=True)
class ReportTable:
    """A table of the page: text cells, the rows whose first cell is `own` marked."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    own: str = ""
    name: str = ""  # shown above it, where a section has several


@dataclass(frozen=True)
class Section:
    """A heading with a picture, tables, or both; without a heading it continues the one before."""

    heading: str = ""
    svg: bytes | None = None
    alt: str = ""  # what the picture shows, in words
    tables: Sequence[ReportTable] = ()


def render_page(numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page of a run.

    Args:
        numbers: what `collect` gives; parts that a run has not reached are missing or None.
        metrics: rows of metrics.jsonl, for the curve of training.
    """
    source = (numbers.get("recipe") or {}).get("source", "a model")
    details = [
        {"name": name, "heading": heading, "text": json.dumps(numbers[name], indent=1)}
        for name, heading in (("plan", "Weight map"), ("recipe", "Recipe"), ("lineage", "Lineage"))
        if numbers.get(name)
    ]
    return render(
        "run.html.j2",
        title=f"regraft: {Path(str(source)).name}",
        headlines=headlines(numbers),
        summary=format_summary(numbers),
        notes=(numbers.get("time") or {}).get("notes", []),
        sections=[*quality_sections(numbers), *cost_sections(numbers, metrics)],
        samples=numbers.get("samples") or [],
        details=details,
    )


def quality_sections(numbers: Mapping[str, Any]) -> Iterator[Section]:
    """Perplexity and KL, benchmarks, recall, and the model's lead over every baseline."""
    if not numbers.get("eval"):
        return
    rows = eval_rows(numbers["eval"])
    yield Section(
        "Quality on held-out text",
        plots.plot_quality(rows),
        "perplexity and KL of every row",
        [quality_table(rows)],
    )
    if "tasks" in rows["model"]:
        heads, body = benchmark_rows(rows)
        yield Section("Benchmarks, percent", tables=[text_table(heads, body, own="model")])
    if "recall" in rows["model"]:
        heads, body = recall_rows(rows)
        heading = "Recall, percent of right answers ranked first"
        yield Section(heading, tables=[text_table(heads, body, own="model")])
    heads, body = lead_rows(rows)
    if body:
        yield Section(LEADS, tables=[text_table(heads, body)])


def cost_sections(
    numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[Section]:
    """The curve of training with the ledger, and speed and memory by context length."""
    ledger = numbers.get("ledger")
    tables = [ledger_table(ledger)] if ledger else []
    rows = (numbers.get("eval") or {}).get("baselines", {})
    untrained = {name: rows[name] for name in ZERO_TOKEN if name in rows}
    if curve := plots.plot_losses(metrics, untrained):
        words = "loss of each stage against tokens, beside the KL of what needs no training"
        yield Section("Training", curve, words, tables)
    elif tables:
        yield Section(tables=tables)
    if numbers.get("bench"):
        yield Section(
            "Speed and memory by context length",
            plots.plot_speed(numbers["bench"]),
            "speed and memory against context length",
            [speed_table(numbers["bench"]), memory_table(numbers["bench"])],
        )


def eval_rows(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Baselines in order, then the model's own row last."""
    own = {key: value for key, value in evaluation.items() if key != "baselines"}
    return {**evaluation.get("baselines", {}), "model": own}


def format_summary(numbers: Mapping[str, Any]) -> str:
    """One sentence of parameters and time."""
    sentences = []
    if plan := numbers.get("plan"):
        sentences.append(f"{plan['parameters']:,} parameters.")
    if numbers.get("ledger"):
        total = numbers["ledger"][-1]
        sentences.append(
            f"Started and trained on {total['tokens']:,} tokens:"
            f" {format_flops(total['flops'])} with the teacher's forward."
        )
    if spent := numbers.get("time"):
        sentences.append(f"The whole run took {spent['seconds'] / 60:.1f} minutes.")
    return " ".join(sentences)


def quality_table(rows: Mapping[str, Mapping[str, Any]]) -> ReportTable:
    """The table of baselines, the model's row marked."""
    keys = ("perplexity", "byte_perplexity", "bits_per_byte", "kl", "tokens")
    cells = ([name, *(row.get(key) for key in keys)] for name, row in rows.items())
    return text_table(
        ("", "perplexity", "per byte", "bits per byte", "KL to teacher", "tokens"),
        cells,
        own="model",
    )


def benchmark_rows(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Heads and lines of the benchmarks, in percent: chance and number of questions, every row, the
    model's standard errors and its part of what the teacher has above chance.
    """
    own = rows["model"]

    def line(name: str, key: str, row: Mapping[str, Any], average: str = "") -> list[Any]:
        values = [
            task[task["metric"] if key == "metric" else key] for task in row["tasks"].values()
        ]
        return [name, *map(percent, [*values, row.get(average)])]

    body = [
        ["questions", *(task["n"] for task in own["tasks"].values()), None],
        line("chance", "chance", own),
    ]
    body += [line(name, "metric", row, "average") for name, row in rows.items() if "tasks" in row]
    body.append(line("± standard error", "stderr", own))
    if "of_teacher" in own:
        body.append(line("of the teacher's above chance", "of_teacher", own, "of_teacher"))
    return ["", *own["tasks"], "average"], body


def lead_rows(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Heads and lines of what the model has more than every other row in benchmarks and recall, in
    percent.
    """
    own = rows["model"]
    heads = [*own["tasks"], "average"] if "tasks" in own else []
    heads += [
        f"{kind} {length}" for kind, cells in own.get("recall", {}).items() for length in cells
    ]
    body = []
    for name, row in rows.items():
        if name != "model" and heads:
            cells = [*row["tasks"].values(), row] if "tasks" in own else []
            cells += [cell for found in row.get("recall", {}).values() for cell in found.values()]
            body.append([name, *(format_lead(cell["difference"]) for cell in cells)])
    return ["", *heads], body


def format_lead(difference: Mapping[str, float | None]) -> str:
    """A difference in percent with its standard error, where it has one."""
    mean, error = difference["mean"], difference["stderr"]
    return f"{100 * (mean or 0.0):+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def recall_rows(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Heads and lines of recall, in percent, one column for every kind and length."""
    cells = [(kind, length) for kind, found in rows["model"]["recall"].items() for length in found]
    lines = [
        [name, *(percent(row["recall"][kind][length]["acc"]) for kind, length in cells)]
        for name, row in rows.items()
        if "recall" in row
    ]
    return ["", *(f"{kind} {length}" for kind, length in cells)], lines


def percent(value: float | None) -> float | None:
    """A share in percent, to a tenth."""
    return None if value is None else round(100 * value, 1)


def ledger_table(ledger: Sequence[Mapping[str, Any]]) -> ReportTable:
    """What every stage cost."""
    rows = [
        [
            row["stage"],
            f"{row['tokens']:,}",
            format_flops(row["flops"]),
            format_duration(row["seconds"]),
        ]
        for row in ledger
    ]
    return ReportTable(("stage", "tokens", "FLOPs", "time"), rows, own="total")


def speed_table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> ReportTable:
    """Tokens per second of every model by context, with shares of the first one's."""
    kinds = {"decode_tok_s": "writes", "prefill_tok_s": "reads"}
    first, heads, body = next(iter(models), ""), ["context"], []
    for name in models:
        for words in kinds.values():
            heads += [f"{name} {words}", *(["of it"] if name != first else [])]
    for cells in zip(*models.values(), strict=False):
        line = [f"{cells[0]['length']:,}"]
        for row in cells:
            for key in kinds:
                line.append(format_speed(row.get(key), key in row.get("extrapolated", ())))
                if row is not cells[0]:
                    own, other = row.get(key), cells[0].get(key)
                    line.append(f"{own / other:.2f}x" if own and other else "—")
        body.append(line)
    batch = next((row.get("batch", 1) for rows in models.values() for row in rows), 1)
    return ReportTable(heads, body, name=f"Tokens per second, batch {batch}")


def memory_table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> ReportTable:
    """State and peak memory of every model by context."""
    kinds = {"state_bytes": "state", "peak_bytes": "peak"}
    heads = ["context", *(f"{name} {words}" for name in models for words in kinds.values())]
    body = [
        [
            f"{cells[0]['length']:,}",
            *(format_bytes(row.get(key)) for row in cells for key in kinds),
        ]
        for cells in zip(*models.values(), strict=False)
    ]
    return ReportTable(heads, body, name="Memory")


def text_table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], own: str = "", name: str = ""
) -> ReportTable:
    """A table whose numbers are shortened."""
    return ReportTable(heads, [[format_number(cell) for cell in row] for row in rows], own, name)
