"""Tables for the eye: quality, benchmarks, recall, perplexity by position, speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .html import LEADS, benchmark_rows, eval_rows, lead_rows
from .units import format_number, format_speed

Numbers = tuple[str, list[str], list[list[str]]]  # title, heads, lines
FRAME = 3  # what a column takes beside its text


def print_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print whatever an evaluation holds, columns that do not fit side by side below each other."""
    rows = eval_rows(evaluation)
    for title, heads, body in (
        *quality(rows),
        *benchmarks(rows),
        *recall(rows),
        *lead_table(rows),
        *positions(rows),
    ):
        for columns in split_columns(heads, body, console.width):
            console.print(
                build_table(
                    title,
                    [heads[i] for i in columns],
                    [[line[i] for i in columns] for line in body],
                )
            )


def split_columns(
    heads: Sequence[str], body: Sequence[Sequence[str]], width: int
) -> Iterator[list[int]]:
    """Column numbers of tables not wider than `width`, the first column in each."""
    first, *widths = (max(map(len, column)) + FRAME for column in zip(heads, *body, strict=True))
    columns = [0]
    for number, wide in enumerate(widths, 1):
        if len(columns) > 1 and 1 + first + wide + sum(widths[i - 1] for i in columns[1:]) > width:
            yield columns
            columns = [0]
        columns.append(number)
    yield columns


def quality(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Numbers]:
    """Perplexity and divergence from the teacher."""
    keys = {"perplexity": "ppl/token", "byte_perplexity": "ppl/byte", "kl": "KL"}
    if own := rows_with_key(rows, "perplexity"):
        some = rows["model"]
        title = f"{some['windows']} windows, {some['tokens']:,} predicted tokens"
        yield (
            title,
            ["", *keys.values()],
            [[name, *(format_quality(row, key) for key in keys)] for name, row in own],
        )


def format_quality(row: Mapping[str, Any], key: str) -> str:
    """A number, with the standard error over windows for KL."""
    shown = format_number(row.get(key))
    error = row.get("kl_error") if key == "kl" else None
    return shown if error is None else f"{shown} ± {error:.2g}"


def benchmarks(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Numbers]:
    """Every task's score in percent, chance first, standard errors last."""
    if rows_with_key(rows, "tasks"):
        heads, body = benchmark_rows(rows)
        norm = [
            name for name, task in rows["model"]["tasks"].items() if task["metric"] == "acc_norm"
        ]
        by = f" (normalised: {', '.join(norm)})" if norm else ""
        yield (
            f"benchmarks, percent{by}",
            heads,
            [[format_number(cell) for cell in line] for line in body],
        )


def recall(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Numbers]:
    """One table a kind: how often the right answer is first among the candidates, and greedy text
    is it.
    """
    some = rows_with_key(rows, "recall")
    for kind, cells in (some[0][1]["recall"] if some else {}).items():
        one = next(iter(cells.values()))
        title = (
            f"{kind}: percent first of {round(1 / one['chance'])} answers / said greedily; n ="
            f" {one['n']}"
        )
        body = [
            [
                name,
                *(
                    f"{100 * cell['acc']:.0f} / {100 * cell['exact']:.0f}"
                    for cell in row["recall"][kind].values()
                ),
            ]
            for name, row in some
        ]
        yield title, ["", *(f"{length} tokens" for length in cells)], body


def lead_table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Numbers]:
    """The model's lead over every other row, which scores with their own errors are too coarse to
    tell.
    """
    heads, body = lead_rows(rows)
    if body:
        yield LEADS, heads, body


def positions(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Numbers]:
    """Perplexity by tokens of context."""
    if some := rows_with_key(rows, "positions"):
        buckets = some[0][1]["positions"]
        heads = ["", *(f"{cell['from']}-{cell['to']}" for cell in buckets)]
        body = [
            [name, *(format_number(cell["perplexity"]) for cell in row["positions"])]
            for name, row in some
        ]
        yield "perplexity by tokens of context", heads, body


def rows_with_key(
    rows: Mapping[str, Mapping[str, Any]], key: str
) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows that have a part."""
    return [(name, row) for name, row in rows.items() if key in row]


def speed_table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Speed and memory by model and length, not wider than a terminal of 80 columns."""
    heads = ["model", "context", "decode/s", "prefill/s", "state MiB", "converted", "peak MiB"]
    batch = next((row["batch"] for rows in models.values() for row in rows), 1)
    body = [
        [name, format_number(r["length"])]
        + [
            format_speed(r.get(key), key in r.get("extrapolated", ()))
            for key in ("decode_tok_s", "prefill_tok_s")
        ]
        + [format_mebibytes(r[key]) for key in ("state_bytes", "converted_bytes", "peak_bytes")]
        for name, rows in models.items()
        for r in rows
    ]
    return build_table(
        f"tokens per second and memory by context length, batch {batch}", heads, body
    )


def acceptance_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a source made of drafted blocks, by length of context.

    Args:
        rows: of `evaluation.verified`.
    """
    heads = ["context", "tokens", "a step", "block", "accepted", "1st", "2nd", "4th", "8th"]
    body = []
    for row in rows:
        blocks = row["blocks"]
        drafted, accepted = (
            sum(block[name] for block in blocks) for name in ("drafted", "accepted")
        )
        by_place = acceptance_by_position(blocks)
        places = [by_place[place] if place < len(by_place) else (0, 0) for place in (0, 1, 3, 7)]
        body.append(
            [f"{row['length']:,}", f"{row['tokens']:,}"]
            + [f"{row['tokens'] / len(blocks):.1f}", f"{drafted / len(blocks):.1f}"]
            + [format_share(*pair) for pair in ((accepted, drafted), *places)]
        )
    return build_table("drafted tokens that the source accepted", heads, body)


def acceptance_by_position(blocks: Sequence[Mapping[str, int]]) -> list[tuple[int, int]]:
    """(accepted, tried) of the first, second, ... token of blocks.

    Tried are those whose predecessors were all accepted.

    Args:
        blocks: `drafted` and `accepted` tokens of each.
    """
    longest = max((block["drafted"] for block in blocks), default=0)
    return [
        (
            sum(block["accepted"] > place for block in blocks),
            sum(block["drafted"] > place <= block["accepted"] for block in blocks),
        )
        for place in range(longest)
    ]


def format_share(part: int, whole: int) -> str:
    """A share in percent; nothing where the whole is 0."""
    return f"{part / whole:.0%}" if whole else ""


def format_mebibytes(count: int | None) -> str:
    """Bytes in MiB; nothing for None, as where a model did not fit."""
    return format_number(None if count is None else count / 2**20)


def training_table(
    stages: Sequence[Mapping[str, Any]], start: Sequence[Mapping[str, Any]] = ()
) -> Table:
    """What `watching.summary` says of every stage, after what was spent before them."""
    heads = ["stage", "tokens", "first", "last", "tokens/s", "of peak", "seconds"]
    before = [
        [row["kind"], f"{row['tokens']:,}", "", "", "", "", f"{row['seconds']:,.1f}"]
        for row in start
    ]
    body = before + [
        [
            f"{row['stage']}: {row['kind']}",
            f"{row['tokens']:,}",
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
        ]
        + [
            format_number(row["tokens_per_second"]),
            "" if row["peak_share"] is None else f"{row['peak_share']:.0%}",
        ]
        + [f"{row['seconds']:,.1f}"]
        for row in stages
    ]
    return build_table("training (mean loss of the first and last 5 % of the steps)", heads, body)


def build_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table, first column left, others right."""
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
