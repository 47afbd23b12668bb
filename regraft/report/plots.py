"""The report's pictures: SVG text drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RegraftError, printable
from ..train.ledger import stage_name

COLOURS = ("#2f6f9f", "#c8643c", "#6a8f3c", "#8a5a9e", "#b08a2e", "#5b6770")


def figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes side by side; RegraftError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"a report needs {error.name}, which is not installed: pip install 'regraft[report]'"
        ) from error
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return drawing, list(axes)


def label(name: str) -> str:
    """A name as matplotlib shows it: dollars begin no formula, an underscore hides no line."""
    shown = printable(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def svg(drawing: Any) -> bytes:
    """The figure as SVG, without a date so that the same numbers give the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "regraft"}):
        drawing.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def plot_losses(
    metrics: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]] | None = None
) -> bytes | None:
    """One panel per stage: loss against the stage's tokens, its running mean on top; None without
    training rows.

    Args:
        metrics: rows of metrics.jsonl.
        baselines: rows of a quality table. Their KL on held-out text is a line in stages of
            distillation, whose loss is the KL on training text.
    """
    stages: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        if "loss" in row:
            stages.setdefault(stage_name(row), []).append((row["tokens"], row["loss"]))
    if not stages:
        return None
    drawing, axes = figure(4.2 * len(stages), 3.2, len(stages))
    for axis, colour, (stage, points) in zip(
        axes, COLOURS * len(stages), stages.items(), strict=False
    ):
        tokens, values = zip(*points, strict=True)
        axis.plot(tokens, values, color=colour, alpha=0.3, linewidth=0.8)
        axis.plot(tokens, smooth(values), color=colour, linewidth=1.6)
        axis.set(title=label(stage), xlabel="tokens", ylabel="loss")
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter(lambda value, _: format_tokens(value))
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        if stage.endswith(" distil"):
            draw_levels(axis, baselines or {})
    return svg(drawing)


def draw_levels(axis: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A line across for the KL of every row that has one."""
    levels = {name: row["kl"] for name, row in rows.items() if row.get("kl")}
    for style, (name, kl) in zip(("--", ":", "-.", "-") * 3, levels.items(), strict=False):
        axis.axhline(kl, linestyle=style, color=COLOURS[5], linewidth=1.0, label=label(name))
    if levels:
        axis.legend(fontsize=6, title="held-out KL of", title_fontsize=6)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential mean whose memory is `share` of the series."""
    rate, mean, out = 1 / max(1.0, share * len(values)), values[0], []
    for value in values:
        mean += rate * (value - mean)
        out.append(mean)
    return out


def plot_quality(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Perplexity and KL to the teacher of every row of the table."""
    drawing, axes = figure(9.0, 0.5 + 0.42 * len(rows), 2)
    names, shown = list(rows), [label(name) for name in rows]
    for axis, key, title in zip(
        axes, ("perplexity", "kl"), ("perplexity per token", "KL(teacher‖model), nats"), strict=True
    ):
        values = [rows[name].get(key) or 0.0 for name in names]
        drawn = axis.barh(
            range(len(names)),
            values,
            color=[COLOURS[0] if "model" in name else COLOURS[5] for name in names],
        )
        axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axis.set(title=title)
        axis.set_yticks(
            range(len(names)), shown if key == "perplexity" else [""] * len(names), fontsize=8
        )
        axis.invert_yaxis()
        axis.margins(x=0.15)
    return svg(drawing)


def plot_speed(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Decode speed, prefill speed, state and peak memory against context length, one line per
    model.
    """
    panels = (
        ("decode_tok_s", 1.0, "decode, tokens/s"),
        ("prefill_tok_s", 1.0, "prefill, tokens/s"),
        ("state_bytes", 2**20, "state, MiB"),
        ("peak_bytes", 2**20, "peak memory, MiB"),
    )
    drawing, axes = figure(12.5, 3.0, len(panels))
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        for colour, (name, rows) in zip(COLOURS, models.items(), strict=False):
            told = [(row["length"], row[key] / unit) for row in rows if row[key] is not None]
            axis.plot(
                *zip(*told, strict=True) if told else ((), ()),
                marker="o",
                color=colour,
                label=label(name),
            )
            # What follows from shorter contexts is hollow.
            for row in rows:
                if key in row.get("extrapolated", ()):
                    point = ([row["length"]], [row[key] / unit])
                    axis.plot(*point, "o", color=colour, markerfacecolor="white")
        axis.set(title=title, xlabel="context, tokens")
        axis.set_xscale("log", base=2)
        if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
            scale_by_factors(axis)
        ticks = sorted({row["length"] for rows in models.values() for row in rows})
        axis.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
    axes[0].legend(fontsize=8)
    return svg(drawing)


def format_tokens(count: float) -> str:
    """A number of tokens on an axis, such as 500, 20k or 1.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def scale_by_factors(axis: Any) -> None:
    """A logarithmic y axis whose ticks have room, and at least two of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:,.10g}")
    axis.tick_params(axis="y", labelsize=7)


def plot_positions(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Perplexity against tokens of context, one line per row, with its standard error."""
    drawing, (axis,) = figure(8.0, 4.2, 1)
    for colour, (name, row) in zip(COLOURS * len(rows), rows.items(), strict=False):
        cells = row["positions"]
        middle = [math.sqrt(max(cell["from"], 1) * cell["to"]) for cell in cells]
        values = [cell["perplexity"] for cell in cells]
        errors = [
            value * (cell["stderr"] or 0.0) for value, cell in zip(values, cells, strict=True)
        ]
        axis.errorbar(
            middle, values, yerr=errors, marker="o", color=colour, label=label(name), capsize=2
        )
    axis.set(xlabel="tokens of context", ylabel="perplexity", xscale="log", yscale="log")
    for place in (
        axis.yaxis.set_major_formatter,
        axis.yaxis.set_minor_formatter,
        axis.xaxis.set_major_formatter,
    ):
        place("{x:.4g}")
    axis.legend(fontsize=8)
    return svg(drawing)


def plot_curves(
    arms: Mapping[str, Mapping[str, Any]], scratch: str, axis: str, words: str
) -> bytes:
    """Mean held-out loss of every arm against FLOPs or seconds, with its range over seeds; scratch
    is black.
    """
    drawing, (panel,) = figure(10.0, 5.2, 1)
    styles = [(colour, line) for line in ("-", "--", ":", "-.") for colour in COLOURS]
    others = [name for name in arms if name != scratch]
    for name, (colour, line) in [(scratch, ("#000000", "-")), *zip(others, styles, strict=False)]:
        if name in arms:
            curve, seeds = arms[name]["curve"], arms[name]["seeds"].values()
            low, high = (
                [
                    pick(values)
                    for values in zip(*(seed["curve"]["loss"] for seed in seeds), strict=True)
                ]
                for pick in (min, max)
            )
            panel.plot(
                curve[axis],
                curve["loss"],
                line,
                color=colour,
                label=label(name),
                linewidth=1.4 + (name == scratch),
            )
            panel.fill_between(curve[axis], low, high, color=colour, alpha=0.06, linewidth=0)
    if scratch in arms:
        panel.axhline(arms[scratch]["curve"]["loss"][-1], color="#000000", linewidth=0.6, alpha=0.6)
    panel.set(xlabel=words, ylabel="held-out loss", yscale="log")
    for place in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        place("{x:.3g}")
    panel.legend(fontsize=7, ncols=2)
    return svg(drawing)


def plot_savings(arms: Mapping[str, Mapping[str, Any]], scratch: str) -> bytes:
    """FLOPs saved until scratch's final loss, in % of scratch's, without and with the source's
    pretraining.
    """
    names = [name for name in arms if name != scratch and "savings" in arms[name]]
    shown = [label(name) for name in names]
    drawing, axes = figure(10.0, 1.0 + 0.3 * len(names), 2)
    panels = (("", "FLOPs saved, %"), ("_with_source", "with the source's pretraining, %"))
    for axis, (end, title) in zip(axes, panels, strict=True):
        key = f"saved_flops_share{end}"
        means = [arms[name]["savings"][key] for name in names]
        errors = [100 * (arms[name]["savings_over_seeds"][key]["std"] or 0.0) for name in names]
        heights = [100 * (mean or 0.0) for mean in means]
        drawn = axis.barh(
            range(len(names)), heights, xerr=errors, color=COLOURS[0], ecolor=COLOURS[5]
        )
        said = ["not reached" if mean is None else f"{100 * mean:.1f}" for mean in means]
        axis.bar_label(drawn, said, padding=3, fontsize=8)
        axis.set(title=title)
        axis.set_yticks(range(len(names)), shown if not end else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2)
    return svg(drawing)
