"""One self-contained HTML page about a run, and the same numbers as report.json."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..io.files import read_json_if_exists, read_json_lines, write_json, write_text
from ..train.ledger import build_ledger
from . import plots

LEADS = "The model's lead on the same questions, percent ± error"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#22272c;background:#fff}
h1{font-size:1.6rem}h3{font-size:1rem;margin-bottom:0}
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d5dade}
table{border-collapse:collapse;font-size:.9rem;margin:.8rem 0}td,th{padding:.25rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}
tr+tr{border-top:1px solid #e4e8eb}tr.own{font-weight:600;background:#eef4f8}
img{max-width:100%;height:auto}p.note{color:#5b6770;font-size:.9rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair div,pre{background:#f5f7f8;padding:.7rem;border-radius:4px}
.pair div,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
"""


def collect(directory: Path) -> dict[str, Any]:
    """The report's numbers from a run directory: whatever its phases have written."""
    names = ("plan", "eval", "bench", "samples", "time", "lineage")
    numbers = {name: read_json_if_exists(directory / f"{name}.json") for name in names}
    recipe = directory / "recipe.yaml"
    numbers["recipe"] = (
        yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else None
    )
    metrics, spent = (
        read_json_lines(directory / "metrics.jsonl"),
        read_json_if_exists(directory / "ledger.json") or {},
    )
    return numbers | {"ledger": build_ledger(metrics, spent.get("start", ()))}


def write(directory: Path) -> Path:
    """Write report.html and report.json into a run directory; returns the page's path."""
    numbers = collect(directory)
    page = render_page(numbers, read_json_lines(directory / "metrics.jsonl"))
    write_json(directory / "report.json", numbers)
    write_text(directory / "report.html", page)
    return directory / "report.html"


def render_page(numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    source = (numbers.get("recipe") or {}).get("source", "a model")
    title = f"regraft: {Path(str(source)).name}"
    parts = [f"<h1>{html.escape(title)}</h1>", format_summary(numbers)]
    if numbers.get("eval"):
        rows = eval_rows(numbers["eval"])
        parts += [
            "<h2>Quality on held-out text</h2>",
            picture(plots.plot_quality(rows), "perplexity and KL of every row"),
            quality_table(rows),
        ]
        if "tasks" in rows["model"]:
            parts += ["<h2>Benchmarks, percent</h2>", table(*benchmark_rows(rows), own="model")]
        if "recall" in rows["model"]:
            parts += [
                "<h2>Recall, percent of right answers ranked first</h2>",
                table(*recall_rows(rows), own="model"),
            ]
        heads, body = lead_rows(rows)
        if body:
            parts += [f"<h2>{LEADS}</h2>", table(heads, body)]
    if curve := plots.plot_losses(metrics):
        parts += ["<h2>Training</h2>", picture(curve, "loss of each stage against tokens")]
    if numbers.get("ledger"):
        parts.append(
            table(
                ("stage", "tokens", "FLOPs", "seconds"),
                ([*row.values()] for row in numbers["ledger"]),
            )
        )
    if numbers.get("bench"):
        drawn = picture(
            plots.plot_speed(numbers["bench"]), "speed and memory against context length"
        )
        parts += [
            "<h2>Speed and memory by context length</h2>",
            drawn,
            *speed_tables(numbers["bench"]),
        ]
    if numbers.get("samples"):
        parts += ["<h2>Text</h2>", *(format_sample(pair) for pair in numbers["samples"])]
    for name, heading in (("plan", "Weight map"), ("recipe", "Recipe"), ("lineage", "Lineage")):
        if numbers.get(name):
            shown = html.escape(json.dumps(numbers[name], indent=1))
            parts += [
                f"<h2>{heading}</h2>",
                f"<details><summary>{name}</summary><pre>{shown}</pre></details>",
            ]
    return page(title, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A self-contained page of HTML pieces."""
    body = "\n".join(parts)
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        "<!doctype html>\n<html"
        f' lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
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
            f"Started and trained on {total['tokens']:,} tokens: {total['flops']:.3g} FLOPs with"
            " the teacher's forward."
        )
    if spent := numbers.get("time"):
        sentences.append(f"The whole run took {spent['seconds'] / 60:.1f} minutes.")
    return f"<p>{html.escape(' '.join(sentences))}</p>"


def quality_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of baselines, the model's row marked."""
    keys = ("perplexity", "byte_perplexity", "bits_per_byte", "kl", "tokens")
    cells = ([name, *(row.get(key) for key in keys)] for name, row in rows.items())
    return table(
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


def speed_tables(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """One table per model."""
    keys = (
        "length",
        "batch",
        "decode_tok_s",
        "prefill_tok_s",
        "state_bytes",
        "converted_bytes",
        "kept_bytes",
        "peak_bytes",
    )
    heads = (
        "context",
        "batch",
        "decode tok/s",
        "prefill tok/s",
        "state bytes",
        "in converted layers",
        "in kept layers",
        "peak bytes",
    )
    return [
        f"<h3>{html.escape(name)}</h3>"
        + table(heads, ([row.get(key) for key in keys] for row in rows))
        for name, rows in models.items()
    ]


def format_sample(pair: Mapping[str, str]) -> str:
    """Teacher and student side by side under their prompt."""
    sides = "".join(
        f"<div><strong>{side}</strong>\n{html.escape(pair[side])}</div>"
        for side in ("teacher", "student")
        if side in pair
    )
    return f'<p class="note">{html.escape(pair["prompt"])}</p><div class="pair">{sides}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], own: str = "") -> str:
    """An HTML table; numbers right-aligned and shortened."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = []
    for row in rows:
        mark = ' class="own"' if own and row[0] == own else ""
        lines.append(
            f"<tr{mark}>"
            + "".join(f"<td>{html.escape(format_number(cell))}</td>" for cell in row)
            + "</tr>"
        )
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def format_number(value: Any) -> str:
    """A number for reading: 4 significant digits, thousands separated, an em dash for nothing."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def picture(data: bytes, words: str) -> str:
    """An SVG inside the page."""
    return (
        f'<img alt="{html.escape(words)}"'
        f' src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}">'
    )
