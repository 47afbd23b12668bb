"""A comparison for reading: one table, pictures, one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots
from ..journal import write_json, write_whole
from ..report import page, picture, table

if TYPE_CHECKING:
    from rich.console import Console

HEADS = (
    "arm",
    "loss at start",
    "final loss",
    "FLOPs saved",
    "with source",
    "seconds saved",
    "with source",
)
NOTE = (
    "Loss is held out, mean and standard deviation over seeds. Saved: until scratch's final loss is first reached, "
    "where the mean curve, linear between evaluations, crosses it, in % of scratch's {flops:.3g} FLOPs and "
    "{seconds:.0f} s; in brackets the standard deviation over seeds that reach it, with their number where some do "
    "not. A fitted map's fitting is always counted, the source's pretraining only where it says so."
)


def write(numbers: Mapping[str, Any], out: Path) -> None:
    """Write compare.json, table.md and compare.html into `out`."""
    write_json(out / "compare.json", numbers)
    rows = list(cells(numbers))
    lines = ["| " + " | ".join(row) + " |" for row in (HEADS, ["---"] * len(HEADS), *rows)]
    words = [*lines, "", note(numbers), *(f"\n{line}" for line in failures(numbers))]
    write_whole(out / "table.md", "\n".join(words) + "\n")
    write_whole(out / "compare.html", render_page(numbers))


def cells(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    """The table's rows as text."""
    for name, source in numbers["sources"].items():
        losses = [one["loss"] for one in source["seeds"].values()]
        shown = f"{sum(losses) / len(losses):.4f}" if losses else "not measured"
        yield [f"({name} itself)", "", shown, "", "", "", ""]
    for name, arm in numbers["arms"].items():
        savings = [saved(arm, f"saved_flops_share{end}", 100, "%") for end in ("", "_with_source")]
        savings += [saved(arm, f"saved_seconds{end}", 1, " s") for end in ("", "_with_source")]
        if name == numbers["scratch"]:
            savings = ["", "", "", ""]
        yield [name, measured(arm["start_loss"]), measured(arm["loss"]), *savings]


def measured(value: Mapping[str, Any]) -> str:
    """Mean and deviation."""
    return f"{value['mean']:.4f} ± {value['std']:.4f}" if value["count"] > 1 else f"{value['mean']:.4f}"


def saved(arm: Mapping[str, Any], key: str, times: float, unit: str) -> str:
    """A saving of the mean curve with its spread over seeds, or that the loss was not reached."""
    if "savings" not in arm:
        return "no scratch"
    value, seeds = arm["savings"][key], arm["savings_over_seeds"][key]
    total = len(arm["seeds"])
    some = f", {seeds['count']} of {total} seeds" if seeds["count"] < total else ""
    if value is None:
        return "not reached" + (f" ({seeds['count']} of {total} seeds do)" if seeds["count"] else "")
    deviation = f" (± {times * seeds['std']:.1f}{some})" if seeds["count"] > 1 else f" ({some[2:]})" if some else ""
    return f"{times * value:.1f}{unit}{deviation}"


def note(numbers: Mapping[str, Any]) -> str:
    """What the columns mean, with scratch's totals."""
    scratch = numbers["arms"].get(numbers["scratch"])
    if scratch is None:
        return "No run of scratch is finished: nothing to save against."
    goal, said = (
        scratch["loss"]["mean"],
        NOTE.format(flops=scratch["flops"]["mean"], seconds=scratch["seconds"]["mean"]),
    )
    for name, source in numbers["sources"].items():
        losses = [one["loss"] for one in source["seeds"].values()]
        if losses and sum(losses) / len(losses) <= goal:
            said += f" {name} has scratch's final loss before it grows: only savings with the source say something."
    return said


def failures(numbers: Mapping[str, Any]) -> list[str]:
    """A line for every run that failed."""
    return [f"FAILED: {one['kind']} {one['name']}, seed {one['seed']}: {one['error']}" for one in numbers["failed"]]


def render(numbers: Mapping[str, Any], console: Console) -> None:
    """The table on a terminal."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for head in HEADS:
        shown.add_column(head, justify="left" if head == "arm" else "right", no_wrap=head == "arm")
    for row in cells(numbers):
        shown.add_row(*row)
    console.print(shown)
    console.print(note(numbers), highlight=False)
    for line in failures(numbers):
        console.print(line, style="red", highlight=False)


def render_page(numbers: Mapping[str, Any]) -> str:
    """The page: curves, bars, the table."""
    title = f"regraft: growth against scratch, task {numbers['task']}, {len(numbers['seeds'])} seeds"
    parts = [f"<h1>{html.escape(title)}</h1>", table(HEADS, cells(numbers), own=numbers["scratch"])]
    parts += [f'<p class="note">{html.escape(line)}</p>' for line in (note(numbers), *failures(numbers))]
    if numbers["arms"]:
        for axis, words in (("flops", "FLOPs"), ("seconds", "seconds")):
            drawn = plots.curves(numbers["arms"], numbers["scratch"], axis, words)
            parts += [f"<h2>Held-out loss against {words}</h2>", picture(drawn, f"loss of every arm against {words}")]
        parts += ["<h2>Savings</h2>", picture(plots.savings(numbers["arms"], numbers["scratch"]), "savings of arms")]
    return page(title, parts)
