"""A comparison for reading: one table, pictures, one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import printable
from ..io.files import write_json, write_text
from ..report import plots, templates
from .numbers import ArmNumbers, ComparisonNumbers, MeanStd, SourceNumbers

if TYPE_CHECKING:
    from rich.console import Console

GROWTH_HEADS = (
    "arm",
    "loss at start",
    "final loss",
    "FLOPs saved",
    "with source",
    "seconds saved",
    "with source",
)
LINEAR_HEADS = (
    "arm",
    "against",
    "loss at start",
    "final loss",
    "KL to source",
    "unfrozen at step",
    "steps to its scratch's loss",
    "times fewer",
    "FLOPs saved",
    "with source",
)
SAVINGS_COLUMNS = 4  # the last columns of either table
NOTE = (
    "Loss is held out, mean and standard deviation over seeds. Saved: until {name}'s final loss is "
    "first reached, where the mean curve, linear between evaluations, crosses it, in % of {name}'s "
    "{flops:.3g} FLOPs and {seconds:.0f} s; in brackets the standard deviation over seeds that "
    "reach it, with their number where some do not. A fitted map's fitting and calibration are "
    "always counted, the source's pretraining only where it says so."
)
FURTHER_SCRATCH_NOTE = "{name}: {flops:.3g} FLOPs, {seconds:.0f} s."


@dataclass(frozen=True)
class Figure:
    """A picture of the page."""

    # The headline above it.
    heading: str
    # What stands for it where pictures are not shown.
    alt: str
    svg: bytes


def write(numbers: ComparisonNumbers, out: Path) -> None:
    """Write compare.json, table.md and compare.html into `out`."""
    write_json(out / "compare.json", numbers)
    write_text(out / "table.md", format_markdown(numbers))
    write_text(out / "compare.html", render_page(numbers))


def is_linear(numbers: ComparisonNumbers) -> bool:
    """Whether any arm is linearized; the table then has other columns than one of growth."""
    return any(arm["linear"] for arm in numbers["arms"].values())


def column_heads(numbers: ComparisonNumbers) -> tuple[str, ...]:
    """Heads of the table: of growth, or of a comparison that linearizes."""
    return LINEAR_HEADS if is_linear(numbers) else GROWTH_HEADS


def scratch_arms(numbers: ComparisonNumbers) -> list[str]:
    """Names of the arms from scratch."""
    return [name for name, arm in numbers["arms"].items() if arm["against"] is None]


def format_markdown(numbers: ComparisonNumbers) -> str:
    """The table and its notes as Markdown."""
    heads = column_heads(numbers)
    table = [heads, ["---"] * len(heads), *format_rows(numbers)]
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in table]

    lines += ["", escape_markdown(format_note(numbers))]
    lines += [f"\n{escape_markdown(line)}" for line in format_failures(numbers)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that begins no other cell, line or HTML tag."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def format_rows(numbers: ComparisonNumbers) -> Iterator[list[str]]:
    """The table's rows as text: every source by itself, then every arm."""
    linear = is_linear(numbers)
    for name, source in numbers["sources"].items():
        loss = mean_source_loss(source)
        shown = "not measured" if loss is None else f"{loss:.4f}"
        if linear:
            yield [f"({name} itself)", "", "", shown, "", "", *[""] * SAVINGS_COLUMNS]
        else:
            yield [f"({name} itself)", "", shown, *[""] * SAVINGS_COLUMNS]

    for name, arm in numbers["arms"].items():
        start, end = format_mean_std(arm["start_loss"]), format_mean_std(arm["loss"])
        if linear:
            kl, unfrozen = format_mean_std(arm["kl"]), format_mean_std(arm["unfrozen"], 0)
            savings = format_linear_savings(arm, numbers["step"])
            yield [name, arm["against"] or "", start, end, kl, unfrozen, *savings]
        else:
            yield [name, start, end, *format_growth_savings(arm)]


def mean_source_loss(source: SourceNumbers) -> float | None:
    """A source's own held-out loss, the mean over seeds; None for a source that was given."""
    losses = [seed["loss"] for seed in source["seeds"].values()]
    return sum(losses) / len(losses) if losses else None


def format_growth_savings(arm: ArmNumbers) -> list[str]:
    """FLOPs and seconds saved, each without and with the source's pretraining."""
    if arm["against"] is None:
        return [""] * SAVINGS_COLUMNS
    return [
        format_saving(arm, "saved_flops_share", 100, "%"),
        format_saving(arm, "saved_flops_share_with_source", 100, "%"),
        format_saving(arm, "saved_seconds", 1, " s"),
        format_saving(arm, "saved_seconds_with_source", 1, " s"),
    ]


def format_linear_savings(arm: ArmNumbers, step: int) -> list[str]:
    """Steps to scratch's loss, how many times fewer, FLOPs saved without and with pretraining."""
    if arm["against"] is None:
        return [""] * SAVINGS_COLUMNS
    return [
        format_saving(arm, "tokens_to_reach", 1 / step, ""),
        format_saving(arm, "times_tokens", 1, " x"),
        format_saving(arm, "saved_flops_share", 100, "%"),
        format_saving(arm, "saved_flops_share_with_source", 100, "%"),
    ]


def format_mean_std(value: MeanStd, digits: int = 4) -> str:
    """Mean and deviation; nothing where nothing was measured."""
    if not value["count"]:
        return ""
    mean = f"{value['mean']:.{digits}f}"
    return f"{mean} ± {value['std']:.{digits}f}" if value["count"] > 1 else mean


def format_saving(arm: ArmNumbers, key: str, factor: float, unit: str) -> str:
    """A saving of the mean curve with its spread over seeds, or that the loss was not reached.

    Args:
        arm: its numbers.
        key: of `Savings`.
        factor: by which the number is multiplied to be in `unit`.
        unit: what stands behind the number.
    """
    if "savings" not in arm:
        return "no scratch"
    value, seeds = arm["savings"][key], arm["savings_over_seeds"][key]

    # An arm that starts with the loss takes nothing to reach it: there is no quotient to show.
    if key.startswith("times") and arm["savings"]["tokens_to_reach"] is not None and value is None:
        return "from the start"

    count, total = seeds["count"], len(arm["seeds"])
    reached_by = f"{count} of {total} seeds"
    if value is None:
        return f"not reached ({reached_by} do)" if count else "not reached"

    notes = []
    if count > 1:
        notes.append(f"± {factor * (seeds['std'] or 0.0):.1f}")
    if count < total:
        notes.append(reached_by)
    spread = f" ({', '.join(notes)})" if notes else ""
    return f"{factor * value:.1f}{unit}{spread}"


def format_note(numbers: ComparisonNumbers) -> str:
    """What the columns mean, with scratch's totals."""
    names = scratch_arms(numbers)
    if not names:
        return "No run of scratch is finished: nothing to save against."

    sentences: list[str] = []
    for name in names:
        arm = numbers["arms"][name]
        totals = {"name": name, "flops": arm["flops"]["mean"], "seconds": arm["seconds"]["mean"]}
        # The columns are explained once; further scratch arms only add their totals.
        sentences.append((FURTHER_SCRATCH_NOTE if sentences else NOTE).format(**totals))

        scratch_loss = arm["loss"]["mean"]
        for source, one in numbers["sources"].items():
            loss = mean_source_loss(one)
            if loss is not None and scratch_loss is not None and loss <= scratch_loss:
                sentences.append(
                    f"{source} itself has {name}'s final loss: "
                    "only savings with the source say something."
                )
    return " ".join(sentences)


def format_failures(numbers: ComparisonNumbers) -> list[str]:
    """A line for every run that failed."""
    return [
        f"FAILED: {run['kind']} {run['name']}, seed {run['seed']}: {run['error']}"
        for run in numbers["failed"]
    ]


def print_table(numbers: ComparisonNumbers, console: Console) -> None:
    """Show the table and its notes on a terminal."""
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


def render_page(numbers: ComparisonNumbers) -> str:
    """The page: the table, its notes, and the figures of every scratch arm."""
    kind = "linearization" if is_linear(numbers) else "growth"
    seeds = len(numbers["seeds"])
    return templates.render(
        "compare.html.j2",
        title=f"regraft: {kind} against scratch, task {numbers['task']}, {seeds} seeds",
        heads=column_heads(numbers),
        rows=list(format_rows(numbers)),
        own=next(iter(scratch_arms(numbers)), ""),
        notes=[format_note(numbers), *format_failures(numbers)],
        figures=list(draw_figures(numbers)),
    )


def draw_figures(numbers: ComparisonNumbers) -> Iterator[Figure]:
    """For every scratch arm, the curves and savings of what is measured against it."""
    arms, names = numbers["arms"], scratch_arms(numbers)

    # Without a finished scratch arm there is one group of all arms, against nothing.
    groups = {
        name: {name: arms[name]} | {n: arm for n, arm in arms.items() if arm["against"] == name}
        for name in names
    } or {"": arms}

    for scratch, group in groups.items():
        beside = f" beside {scratch}" if len(names) > 1 else ""
        for axis, words in (("flops", "FLOPs"), ("seconds", "seconds")):
            svg = plots.plot_curves(group, scratch, axis, words)
            heading = f"Held-out loss against {words}{beside}"
            yield Figure(heading, f"loss of every arm against {words}{beside}", svg)
        svg = plots.plot_savings(group, scratch)
        yield Figure(f"Savings{beside}", f"savings of arms{beside}", svg)
