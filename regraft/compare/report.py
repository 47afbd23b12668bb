"""A comparison for reading: one table, pictures, one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import write_json, write_text
from ..report import plots
from ..report.html import page, picture, table

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
LINEAR = (
    *("arm", "against", "loss at start", "final loss", "KL to source", "unfrozen at step"),
    *("steps to its scratch's loss", "times fewer", "FLOPs saved", "with source"),
)
NOTE = (
    "Loss is held out, mean and standard deviation over seeds. Saved: until {name}'s final loss is first reached, "
    "where the mean curve, linear between evaluations, crosses it, in % of {name}'s {flops:.3g} FLOPs and "
    "{seconds:.0f} s; in brackets the standard deviation over seeds that reach it, with their number where some do "
    "not. A fitted map's fitting and calibration are always counted, the source's pretraining only where it says so."
)
MORE = "{name}: {flops:.3g} FLOPs, {seconds:.0f} s."


def write(numbers: Mapping[str, Any], out: Path) -> None:
    """Write compare.json, table.md and compare.html into `out`."""
    write_json(out / "compare.json", numbers)
    heads, rows = column_heads(numbers), list(format_rows(numbers))
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    words = [*lines, "", format_note(numbers), *(f"\n{line}" for line in format_failures(numbers))]
    write_text(out / "table.md", "\n".join(words) + "\n")
    write_text(out / "compare.html", render_page(numbers))


def column_heads(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads of the table: of growth, or of a comparison that linearizes."""
    return LINEAR if any(arm["linear"] for arm in numbers["arms"].values()) else HEADS


def scratch_arms(numbers: Mapping[str, Any]) -> list[str]:
    """Arms from scratch."""
    return [name for name, arm in numbers["arms"].items() if arm["against"] is None]


def format_rows(numbers: Mapping[str, Any]) -> Iterator[list[str]]:
    """The table's rows as text."""
    linear = column_heads(numbers) == LINEAR
    for name, source in numbers["sources"].items():
        losses = [one["loss"] for one in source["seeds"].values()]
        shown = f"{sum(losses) / len(losses):.4f}" if losses else "not measured"
        yield [f"({name} itself)", *[""] * (1 + linear), shown, *[""] * (6 if linear else 4)]
    for name, arm in numbers["arms"].items():
        start, end = format_mean_std(arm["start_loss"]), format_mean_std(arm["loss"])
        savings = [
            format_saving(arm, f"saved_flops_share{end}", 100, "%") for end in ("", "_with_source")
        ]
        if linear:
            steps = [
                format_saving(arm, "tokens_to_reach", 1 / numbers["step"], ""),
                format_saving(arm, "times_tokens", 1, " x"),
            ]
            savings = [*steps, *savings]
        else:
            savings += [
                format_saving(arm, f"saved_seconds{end}", 1, " s") for end in ("", "_with_source")
            ]
        if arm["against"] is None:
            savings = [""] * 4
        if linear:
            yield [
                name,
                arm["against"] or "",
                start,
                end,
                format_mean_std(arm["kl"]),
                format_mean_std(arm["unfrozen"], 0),
                *savings,
            ]
        else:
            yield [name, start, end, *savings]


def format_mean_std(value: Mapping[str, Any], digits: int = 4) -> str:
    """Mean and deviation; nothing where nothing was measured."""
    if not value["count"]:
        return ""
    mean = f"{value['mean']:.{digits}f}"
    return f"{mean} ± {value['std']:.{digits}f}" if value["count"] > 1 else mean


def format_saving(arm: Mapping[str, Any], key: str, times: float, unit: str) -> str:
    """A saving of the mean curve with its spread over seeds, or that the loss was not reached."""
    if "savings" not in arm:
        return "no scratch"
    value, seeds = arm["savings"][key], arm["savings_over_seeds"][key]
    if key.startswith("times") and arm["savings"]["tokens_to_reach"] is not None and value is None:
        return "from the start"
    total = len(arm["seeds"])
    some = f", {seeds['count']} of {total} seeds" if seeds["count"] < total else ""
    if value is None:
        return "not reached" + (
            f" ({seeds['count']} of {total} seeds do)" if seeds["count"] else ""
        )
    deviation = (
        f" (± {times * seeds['std']:.1f}{some})"
        if seeds["count"] > 1
        else f" ({some[2:]})"
        if some
        else ""
    )
    return f"{times * value:.1f}{unit}{deviation}"


def format_note(numbers: Mapping[str, Any]) -> str:
    """What the columns mean, with scratch's totals."""
    names = scratch_arms(numbers)
    if not names:
        return "No run of scratch is finished: nothing to save against."
    said: list[str] = []
    for name in names:
        arm = numbers["arms"][name]
        totals = {"name": name, "flops": arm["flops"]["mean"], "seconds": arm["seconds"]["mean"]}
        said.append((MORE if said else NOTE).format(**totals))
        for source, one in numbers["sources"].items():
            losses = [seed["loss"] for seed in one["seeds"].values()]
            if losses and sum(losses) / len(losses) <= arm["loss"]["mean"]:
                said.append(
                    f"{source} itself has {name}'s final loss: only savings with the source say something."
                )
    return " ".join(said)


def format_failures(numbers: Mapping[str, Any]) -> list[str]:
    """A line for every run that failed."""
    return [
        f"FAILED: {one['kind']} {one['name']}, seed {one['seed']}: {one['error']}"
        for one in numbers["failed"]
    ]


def print_table(numbers: Mapping[str, Any], console: Console) -> None:
    """The table on a terminal."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for head in column_heads(numbers):
        shown.add_column(head, justify="left" if head == "arm" else "right", no_wrap=head == "arm")
    for row in format_rows(numbers):
        shown.add_row(*row)
    console.print(shown)
    console.print(format_note(numbers), highlight=False)
    for line in format_failures(numbers):
        console.print(line, style="red", highlight=False)


def render_page(numbers: Mapping[str, Any]) -> str:
    """The page: the table, and for every scratch arm the curves and bars of what is measured against it."""
    kind = "linearization" if column_heads(numbers) == LINEAR else "growth"
    title = (
        f"regraft: {kind} against scratch, task {numbers['task']}, {len(numbers['seeds'])} seeds"
    )
    names = scratch_arms(numbers)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        table(column_heads(numbers), format_rows(numbers), own=next(iter(names), "")),
    ]
    parts += [
        f'<p class="note">{html.escape(line)}</p>'
        for line in (format_note(numbers), *format_failures(numbers))
    ]
    groups = {
        name: [name, *(n for n, arm in numbers["arms"].items() if arm["against"] == name)]
        for name in names
    }
    for scratch, members in groups.items() if names else [("", list(numbers["arms"]))]:
        arms = {name: numbers["arms"][name] for name in members}
        beside = f" beside {html.escape(scratch)}" if names[1:] else ""
        for axis, words in (("flops", "FLOPs"), ("seconds", "seconds")):
            drawn = plots.plot_curves(arms, scratch, axis, words)
            alt = f"loss of every arm against {words}{beside}"
            parts += [f"<h2>Held-out loss against {words}{beside}</h2>", picture(drawn, alt)]
        parts += [
            f"<h2>Savings{beside}</h2>",
            picture(plots.plot_savings(arms, scratch), f"savings of arms{beside}"),
        ]
    return page(title, parts)
