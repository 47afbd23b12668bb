"""Tables of quality and speed: a model beside its baselines, as JSON and for the eye."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import hosts
from .checkpoint import Checkpoint
from .errors import RegraftError
from .evals import baselines
from .evals.perplexity import Candidate, measure
from .report import eval_rows, short
from .text import held_out
from .uptrain.data import Packed, long_windows, read_documents

Progress = Callable[[int, int], None]


def evaluation_windows(data: str | None, tokenizer: Any, count: int, length: int) -> Packed:
    """`count` windows of `length` tokens, each inside one document, spread evenly over the text.

    Without `data`, the held-out topics of Python's documentation. RegraftError when no document is that long.
    """
    if count < 1 or length < 2:
        raise RegraftError(f"cannot measure {count} windows of {length} tokens: ask for >= 1 window of >= 2 tokens")
    rows = long_windows(read_documents(data) if data else held_out(), tokenizer, length)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def evaluate(
    model: str, baseline: str | None, data: str | None, count: int, length: int, progress: Progress | None = None
) -> dict[str, Any]:
    """The table of one model: its own fields and `baselines` by name.

    With `baseline`, a source: the teacher, the zero-token windows and, when the model's lineage tells how it was
    linearized, the conversion before training; every row's KL is to that teacher. A gated model also has a row with its
    linear branch switched off.
    """
    checkpoint = Checkpoint.open(model)
    rows = evaluation_windows(data, hosts.load_tokenizer(model), count, length)
    candidates: dict[str, Candidate] = {}
    if baseline:
        remix = baselines.remix_of(checkpoint)
        makers = baselines.zero_token(Checkpoint.open(baseline), remix) if remix else {}
        teacher = {baselines.TEACHER: lambda: Candidate(hosts.load(baseline))}
        candidates |= {name: make() for name, make in (teacher | makers).items()}
    candidates |= baselines.trained(hosts.materialize(checkpoint))
    scores = measure(candidates, rows.input_ids, rows.bytes, baselines.TEACHER if baseline else None, progress)
    return assemble({name: score.json() for name, score in scores.items()}, model)


def assemble(rows: Mapping[str, dict[str, Any]], model: str) -> dict[str, Any]:
    """The contract's JSON: the model's fields on top, every other row under `baselines`."""
    order = (*baselines.ROWS, *rows)
    others = {name: rows[name] for name in dict.fromkeys(order) if name in rows and name != baselines.MODEL}
    return {"model": model, **rows[baselines.MODEL], "baselines": others}


def render(table: Mapping[str, Any], console: Console) -> None:
    """Print the quality table."""
    keys = {"perplexity": "ppl/token", "byte_perplexity": "ppl/byte", "kl": "KL"}
    heads = ["", *keys.values()]
    rows = eval_rows(table)
    body = [[name, *(short(row.get(key)) for key in keys)] for name, row in rows.items()]
    some = table["windows"], table["tokens"]
    console.print(grid(f"{some[0]} windows, {some[1]:,} predicted tokens", heads, body))


def render_bench(models: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """Print speed and memory, models interleaved by length."""
    heads = ["model", "context", "decode/s", "prefill/s", "state MiB", "converted", "peak MiB"]
    body = [
        [name, short(r["length"]), short(r["decode_tok_s"]), short(r["prefill_tok_s"])]
        + [short(r[key] / 2**20) for key in ("state_bytes", "converted_bytes", "peak_bytes")]
        for name, rows in models.items()
        for r in rows
    ]
    console.print(grid("tokens per second and memory by context length", heads, body))


def grid(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table, first column left, others right."""
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
