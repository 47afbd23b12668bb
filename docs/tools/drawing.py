"""Pictures of matrices and of layers: SVG by matplotlib, one palette, WIDE pixels across."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath
from tracing import Matrix, Scene, Slot

from regraft.errors import RegraftError
from regraft.report import plots

LOOKS = {  # colour, what the legend says, what stands in the cell
    "old": ("#2f6f9f", "old entry", ""),
    "copy": ("#5aa89b", "further copy", ""),
    "following": ("#b08a2e", "copy from the next layer", ""),
    "random": ("#dd8452", "random, free", ""),
    "opposite": ("#a8456b", "its neighbour, opposite sign", "−"),
    "average": ("#8a6bb0", "average of the old ones", ""),
    "zero": ("#ffffff", "zero", "0"),
    "one": ("#dfe3e8", "one", "1"),
}
INK, PALE, EDGE, WHITE = "#2b3138", "#848d97", "#c9d0d6", "#ffffff"
WIDE, MARGIN, ARROW, GAP, HEAD, BAND = 600, 30, 50, 24, 25, 62  # pixels
FONTS = ["DejaVu Sans", "Verdana", "Arial"]
LEANER = (  # what matplotlib writes and nobody needs, and what stands instead
    (
        (
            r"<metadata>.*?</metadata>| clip-path=\"[^\"]*\"|<defs>\s*<clipPath.*?</defs>|"
            r" transform=\"rotate\(-0 [^\"]*\""
        ),
        "",
    ),
    (r"font-family: [^;]*; ", ""),
    (r"(<style [^>]*>)", r"\1text{font-family: 'DejaVu Sans', Verdana, Arial, sans-serif} "),
    (r"(\d\.\d\d)\d+", r"\1"),
    (r"<g id=\"text_\d+\">\s*(<text[^<]*</text>)\s*</g>", r"\1"),
    (r"(?<=[\dz])\s*\n(?=[LzCQ\"])", " "),
    (r"\s*\n\s*", "\n"),
)
LAYERS = ("#d3ebe1", "#a5d3cd", "#74b4c0", "#4a8fb1", "#3b669a", "#3d3f7c")
FRACTIONS = {0.5: "½", 1 / 3: "⅓", 0.25: "¼"}


class Canvas:
    """A figure measured in pixels, (0, 0) top left, WIDE across."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDE / 96, height / 96), facecolor="white")
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, WIDE), ylim=(height, 0))
        self.axis.axis("off")
        self.boxes: list[Rectangle] = []

    def text(
        self, x: float, y: float, words: str, size: float = 8, colour: str = INK, **more: Any
    ) -> None:
        """Words centred at a point."""
        if words:
            self.axis.text(
                x,
                y,
                words,
                fontsize=size,
                color=colour,
                **({"ha": "center", "va": "center"} | more),
            )

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, **more: Any
    ) -> None:
        """A filled rectangle."""
        style: dict[str, Any] = {
            "edgecolor": EDGE if colour == WHITE else WHITE,
            "linewidth": 0.8,
        } | more
        self.boxes.append(Rectangle((x, y), width, height, facecolor=colour, **style))

    def add(self, patch: Any) -> None:
        """Any other shape."""
        self.axis.add_patch(patch)

    def svg(self) -> bytes:
        """The figure as small SVG; words stay words, so that they can be found and read aloud."""
        self.axis.add_collection(PatchCollection(self.boxes, match_original=True, zorder=2))
        with rc_context({"svg.fonttype": "none", "font.sans-serif": FONTS}):
            text = plots.svg(self.figure).decode()
        for pattern, better in LEANER:
            text = re.sub(pattern, better, text, flags=re.S)
        return text.encode()


Entry = tuple[str, str, str]  # colour, words and mark of a legend's swatch


def legend_layout(entries: Sequence[Entry]) -> list[tuple[float, float, Entry]]:
    """(x, y, entry) of a legend's swatches, in as many rows as they need."""
    x, y, spots = 14.0, 0.0, []
    for entry in entries:
        need = 34 + TextPath((0, 0), entry[1], size=7.5 * 96 / 72).get_extents().width
        if x + need > WIDE + 12:
            x, y = 14.0, y + 18
        spots.append((x, y, entry))
        x += need
    return spots


def legend(canvas: Canvas, top: float, spots: Sequence[tuple[float, float, Entry]]) -> None:
    """Swatches with words."""
    for x, y, (colour, words, mark) in spots:
        canvas.box(x, top + y - 6, 12, 12, colour)
        canvas.text(x + 6, top + y, mark, 7, PALE if mark in ("0", "1") else WHITE)
        canvas.text(x + 17, top + y, words, 7.5, ha="left")


def matrix(canvas: Canvas, drawn: Matrix, x: float, middle: float, cell: float) -> None:
    """A matrix with its middle line at `middle`."""
    rows, columns = drawn.kinds.shape
    y = middle - rows * cell / 2
    for row, column in np.ndindex(rows, columns):
        colour, _, mark = LOOKS[str(drawn.kinds[row, column])]
        left, high, constant = x + column * cell, y + row * cell, mark in ("0", "1")
        canvas.box(
            left,
            high,
            cell,
            cell,
            colour if constant else tint(colour, float(drawn.shades[row, column])),
        )
        mark = "•" if drawn.noisy[row, column] else mark
        canvas.text(left + cell / 2, high + cell / 2, mark, 8, PALE if constant else WHITE)
    canvas.box(x, y, columns * cell, rows * cell, "none", edgecolor="#aab3bb", linewidth=0.9)
    numbers(canvas, drawn, x, y, cell)


def numbers(canvas: Canvas, drawn: Matrix, x: float, y: float, cell: float) -> None:
    """Beside a matrix: the places of its entries in the source, and what copies are multiplied by."""
    rows, columns = drawn.kinds.shape
    below = y + rows * cell + 9
    for place, origin in enumerate(drawn.lines(drawn.origins)):
        along = (place + 0.5) * cell
        if origin is not None:
            canvas.text(
                *((x - 7, y + along) if drawn.axis == 0 else (x + along, y - 7)),
                str(origin),
                7,
                PALE,
            )
    times = drawn.lines(drawn.times)
    factors = set(times) - {None}
    if factors == {1.0}:
        return
    if len(factors) == 1 and (drawn.axis == 0 or None not in times):
        canvas.text(x + columns * cell / 2, below, f"× {fraction(factors.pop())}", 7)
    elif drawn.axis == 1:
        canvas.text(x - 5, below, "×", 7)
        for place, value in enumerate(times):
            canvas.text(
                x + (place + 0.5) * cell, below, "" if value is None else fraction(value), 7
            )
    else:
        raise RegraftError(
            f"rows of '{drawn.title}' are multiplied by {sorted(factors)}: find a place for them"
        )


def tint(colour: str, size: float) -> str:
    """A colour, paler for small numbers."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + (part - 255) * (0.5 + 0.5 * size)):02x}" for part in parts)


def fraction(value: float) -> str:
    """½, or two decimals."""
    near = [words for number, words in FRACTIONS.items() if abs(number - value) < 1e-5]
    return near[0] if near else f"{value:.2f}".removeprefix("0").removesuffix(".00")


def picture(scenes: Sequence[Scene]) -> bytes:
    """SVG of one or two scenes, the source to the left of the grown model."""
    most = max(len(one.olds) for one in scenes)
    room = WIDE - 2 * MARGIN - ARROW - 2 * (most - 1) * GAP
    cell = min(24, room // max(one.columns for one in scenes))
    used = {kind for one in scenes for drawn in one.every for kind in drawn.kinds.flat}
    entries = [value for kind, value in LOOKS.items() if kind in used]
    if any(drawn.noisy.any() for one in scenes for drawn in one.news):
        entries.append((LOOKS["copy"][0], "noise that sums to zero over copies", "•"))
    spots = legend_layout(entries)
    tops = [
        HEAD + sum(one.rows * cell + BAND for one in scenes[:number])
        for number in range(len(scenes) + 1)
    ]
    canvas = Canvas(tops[-1] + spots[-1][1] + 20)
    for one, top in zip(scenes, tops, strict=False):
        draw_scene(canvas, one, top, cell)
    legend(canvas, tops[-1] + 4, spots)
    return canvas.svg()


def draw_scene(canvas: Canvas, one: Scene, top: float, cell: float) -> None:
    """One scene of a picture."""
    high = top + 34
    middle = high + one.rows * cell / 2
    x = (WIDE - one.columns * cell - 2 * (len(one.olds) - 1) * GAP - ARROW) / 2 + (
        8 if one.name else 0
    )
    for group, words in ((one.olds, "source"), (one.news, "grown")):
        begin = x
        for drawn in group:
            width = drawn.kinds.shape[1] * cell
            canvas.text(x + width / 2, high - 29, drawn.title, 8.5, weight="bold")
            canvas.text(x + width / 2, high - 17, drawn.note, 7, PALE)
            matrix(canvas, drawn, x, middle, cell)
            x += width + GAP
        if top == HEAD:
            canvas.text((begin + x - GAP) / 2, 11, words, 8.5, PALE)
        x += ARROW - GAP
        if group is one.olds:
            tail, tip = (x - ARROW + 10, middle), (x - 18, middle)
            canvas.add(FancyArrowPatch(tail, tip, arrowstyle="-|>", mutation_scale=11, color=PALE))
    canvas.text(10, middle, one.name, 8, PALE, rotation=90)


def layer_diagram(slots: Sequence[Slot]) -> bytes:
    """SVG of which source layer each layer of a deeper model comes from, the input to the left."""
    canvas, left, width, tall, high, low = Canvas(184), 62, 36, 34, 10, 92
    step = min(52, (WIDE - left - 8) / len(slots))
    starts = [left + (len(slots) - 6) * step / 2 + layer * step for layer in range(6)]
    canvas.text(10, high + tall / 2, "source", 8.5, PALE, ha="left")
    canvas.text(10, low + tall / 2, "grown", 8.5, PALE, ha="left")
    canvas.text(left, low + tall + 10, "input →", 7, PALE, ha="left")
    for layer, x in enumerate(starts):
        draw_layer(canvas, x, high, width, tall, Slot(layer, False))
    for place, slot in enumerate(slots):
        x = left + place * step
        draw_layer(canvas, x, low, width, tall, slot)
        if slot.source is not None:
            one, other = (starts[slot.source] + width / 2, high + tall), (x + width / 2, low)
            curve = Curve(
                [one, (one[0], one[1] + 26), (other[0], other[1] - 26), other], [1, 4, 4, 4]
            )
            style: dict[str, Any] = {
                "linewidth": 2,
                "linestyle": "dashed" if slot.idle else "solid",
                "zorder": 0,
            }
            canvas.add(PathPatch(curve, facecolor="none", edgecolor=LAYERS[slot.source], **style))
    entries = [(LAYERS[3], "maps of the source layer of that number", "3")]
    if any(slot.idle for slot in slots):
        entries.append((WHITE, "outputs zero: idle at first", "0"))
    if any(slot.source is None for slot in slots):
        entries.append((LOOKS["random"][0], "random maps", ""))
    legend(canvas, low + tall + 42, legend_layout(entries))
    return canvas.svg()


def draw_layer(canvas: Canvas, x: float, y: float, width: float, tall: float, slot: Slot) -> None:
    """One layer; where it is idle a strip on top stands for its outputs."""
    colour = LOOKS["random"][0] if slot.source is None else LAYERS[slot.source]
    shape: dict[str, Any] = {
        "boxstyle": "round,pad=2,rounding_size=4",
        "facecolor": colour,
        "linewidth": 1,
    }
    lines: dict[str, Any] = (
        {"edgecolor": INK, "linestyle": "dashed"} if slot.idle else {"edgecolor": WHITE}
    )
    canvas.add(FancyBboxPatch((x + 2, y + 2), width - 4, tall - 4, **shape, **lines))
    words, pale = (
        "" if slot.source is None else str(slot.source),
        slot.source is not None and slot.source < 2,
    )
    canvas.text(
        x + width / 2, y + tall / 2 + (6 if slot.idle else 0), words, 8.5, INK if pale else WHITE
    )
    if slot.idle:
        canvas.box(x + 4, y + 3, width - 8, 12, WHITE)
        canvas.text(x + width / 2, y + 9, "0", 7, PALE)
