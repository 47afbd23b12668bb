"""Writes docs/gallery.md and its pictures: what every operator of growth does to a small matrix,
and when to use it.

Nothing is drawn by hand. Tiny models are grown by the steps themselves. Where a number of a grown
matrix comes from is found out by changing the source's numbers one by one and looking at what
moves: nothing (a constant), one entry (a copy), some (an average) or all (random numbers, whose
spread is the tensor's). Words come from the tables in regraft/growth/operators.py and from
docstrings.

Run: python docs/tools/gallery.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from drawing import layer_diagram, picture
from tracing import (
    ATTENTION,
    HEADS,
    ONE_HEAD,
    RMS,
    UNITS,
    Matrix,
    Scene,
    Slot,
    Source,
    on_stream,
    on_units,
    same,
    scene,
    trace_layers,
)

from regraft.core import axes
from regraft.errors import RegraftError
from regraft.growth import build, depth, rotary
from regraft.growth import sizes as solving
from regraft.growth.operators import DEPTH, PRESERVES, WIDTH, Operator
from regraft.growth.steps.widen import Widen

WIDER = """An axis has tensors that *write* it, whose rows are its coordinates, and tensors that *read* it, whose
columns are. Matrices are drawn as (outputs, inputs). Grey numbers say which old coordinate an entry belongs to or
copies, numbers under a matrix what copies are multiplied by; paler cells are smaller numbers. First comes an axis of
*units*, the neurons of a gated MLP; then the *stream*, where `down` stands for everything that writes it and `up` for
everything that reads it behind a norm. A padded stream has a smaller mean square: here the norms' gains and epsilon
make up for it, with `fold="stream"` everything that is written does. Sizes are what the operator takes; the class of a
family may want more of them and says so when it refuses."""
DEEPER = """Which layer of the source each layer of the grown model comes from. The layer next to the input, number 0,
is on the left."""
COMPOSABLE = """Gesmundo & Maile (arXiv 2308.06103) compose any growth of six expansions, each exact. Here they are
arguments of two steps, made exact on real classes, which have norms with an epsilon, LayerNorms, rotary positions,
grouped queries and tied embeddings. Stock classes have one width for queries, keys and values, so the third and the
fourth come together: old keys make up for the new softmax scale, and rotary pairs move to where their frequencies
stay."""


def describe_sizes(sizes: Sequence[int], old: int, make: Callable[[int], Any]) -> str:
    """Which of some sizes an operator takes, found by asking for each."""
    taken = []
    for size in sizes:
        try:
            make(size)
            taken.append(size)
        except RegraftError:
            continue
    if taken == list(sizes):
        return "any size"
    if taken == [size for size in sizes if size % old == 0]:
        return "whole multiples"
    if taken == [size for size in sizes if size <= 2 * old]:
        return "at most twice as many"
    raise RegraftError(
        f"no words for an operator that takes {taken} of {list(sizes)}: add them to"
        " docs/tools/gallery.py"
    )


def width_sizes(how: str) -> str:
    """Sizes that a width operator takes, on units and on the stream."""
    made = Source(RMS | {"intermediate_size": 4}).checkpoint
    sizes = range(5, 17)
    units = describe_sizes(sizes, 4, lambda size: Widen(ffn=size, how=f"ffn={how}")(made))
    stream = describe_sizes(sizes, 4, lambda size: Widen(hidden=size, how=f"hidden={how}")(made))
    return units if units == stream else f"units: {units}; stream: {stream}"


def depth_sizes(how: str) -> str:
    """Numbers of layers that a depth operator takes."""
    return describe_sizes(
        range(5, 17), 4, lambda size: depth.build_layer_order(how, 4, size)
    ).replace("any size", "any number of layers")


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join((text or "").split()).split(". ")[0].removesuffix(".") + "."


def describe_function(name: str, function: Callable[..., Any]) -> str:
    """A function's name and docstring."""
    return f"`{name}`: " + " ".join((function.__doc__ or "").split())


def maps(how: str) -> str:
    """The functions of regraft.core.axes behind a width operator, and their docstrings."""
    source = Source(UNITS | {"hidden_size": 4}).checkpoint
    made = build.build_widening(source, solving.WidthSizes(hidden=8, ffn=8), how).axes
    names = {"units": made["ffn"].name, "stream": made["hidden"].name}
    said = {
        name: f"`axes.{name}`: {first_sentence(getattr(axes, name).__doc__)}"
        for name in names.values()
    }
    if len(said) == 1:
        return said[names["units"]]
    return " ".join(f"{place.capitalize()}, {said[name]}" for place, name in names.items())


def link_concepts(words: str) -> str:
    """Mentions of the concept pages as links: `docs/concepts/expansions.md, section 6`, or `..,
    L3`, or a short [E].
    """
    pattern = r"docs/concepts/(\w+)\.md(?:, (?:section (\d+)|(L\d+)))?"

    def link(found: re.Match[str]) -> str:
        page, section, lemma = found.groups()
        place = f"section {section}" if section else lemma
        anchor = f"#section-{section}" if section else f"#{lemma}" if lemma else ""
        return f"[{page}{', ' * bool(place)}{place or ''}](concepts/{page}.md{anchor})"

    words = words.replace("[E]", "docs/concepts/expansions.md, section 6")
    words = words.replace("[L]", "docs/concepts/ligo.md, section 4")
    return re.sub(pattern, link, words)


def facts(one: Operator, *rows: tuple[str, str]) -> str:
    """The table under an operator's name."""
    lines = [
        ("Preserves", PRESERVES[one.preserves]),
        *rows,
        ("Paper", one.papers_text),
        ("When", link_concepts(one.when)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in lines)])


def sentence(words: str) -> str:
    """With a capital letter and a full stop."""
    return words[0].upper() + words[1:] + "."


def describe_scenes(scenes: Sequence[Scene]) -> str:
    """Matrices in words, for those who do not see them."""
    return "; ".join(
        f"{one.name} {', '.join(drawn.describe() for drawn in one.news)}".strip() for one in scenes
    )


def describe_new_entries(*drawn: Matrix) -> str:
    """What new entries hold, matrix by matrix."""
    kinds = {one.title: {str(kind) for kind in one.kinds.flat} - {"old", "copy"} for one in drawn}
    return ", ".join(
        f"`{title}` {' and '.join(sorted(words))}" for title, words in kinds.items() if words
    )


class Page:
    """The gallery: its text, and its pictures by file name, drawn when asked for."""

    def __init__(self) -> None:
        self.pictures: dict[str, Callable[[], bytes]] = {}
        blocks = [
            *overview_section(),
            *self.widths(),
            *self.depths(),
            *self.composable(),
            *sources_section(),
        ]
        self.text = "\n\n".join(blocks) + "\n"

    def image(self, name: str, words: str, draw: Callable[[], bytes]) -> str:
        """A picture's line in the page."""
        self.pictures[f"{name}.svg"] = draw
        return f"![{words}](gallery/{name}.svg)"

    def widths(self) -> list[str]:
        """The operators on an axis."""
        blocks = ["## Wider", WIDER.replace("\n", " ")]
        for how, one in WIDTH.items():
            noise = build.NOISE.get(how)
            on = (
                f"{noise:g} of a tensor's own spread, unless `noise` says otherwise"
                if noise
                else "off by default"
            )
            rows = (("Sizes", width_sizes(how)), ("Noise", on), ("Code", maps(how)))
            blocks += [f"### {how}", sentence(one.does), facts(one, *rows)]
            blocks += [
                self.one_kind(how, "units", on_units),
                self.one_kind(how, "stream", on_stream),
            ]
        return blocks

    def one_kind(self, how: str, kind: str, scenes: Callable[[str], tuple[Scene, ...]]) -> str:
        """The picture of an operator, or the name of an earlier one that does the same there."""
        place = "the stream" if kind == "stream" else kind
        for other in list(WIDTH)[: list(WIDTH).index(how)]:
            if same(scenes(how), scenes(other)):
                return f"On {place} it does what [`{other}`](#{other}) does."
        return self.image(
            f"{how}-{kind}",
            f"{how} on {place}: {describe_scenes(scenes(how))}",
            lambda: picture(scenes(how)),
        )

    def depths(self) -> list[str]:
        """The operators on the stack of layers."""
        blocks = ["## Deeper", DEEPER.replace("\n", " ")]
        for how, one in DEPTH.items():
            slots = trace_layers(how)
            marks = [
                ("random" if s.source is None else str(s.source)) + (" (idle)" if s.idle else "")
                for s in slots
            ]
            words = f"{how}, 6 to {len(slots)} layers: {', '.join(marks)}"
            blocks += [f"### {how}", sentence(one.does), facts(one, ("Sizes", depth_sizes(how)))]
            blocks += [self.image(how, words, partial(layer_diagram, slots))]
        return blocks

    def composable(self) -> list[str]:
        """The paper's six expansions as arguments of the steps, with what their new entries hold."""
        heads = (scene("", HEADS, ATTENTION, heads=3, kv_heads=3),)
        wider = (scene("", ONE_HEAD, ATTENTION, head_dim=4),)
        (units,), (rms, norm) = on_units("pad"), on_stream("pad")
        q, k, v, o = wider[0].news
        stream = "; ".join(f"{one.name}: {describe_new_entries(*one.news)}" for one in (rms, norm))
        layer = next(
            "outputs zero, other maps random"
            for slot in trace_layers("identity")
            if slot == Slot(None, True)
        )
        rows = [
            (
                "3.1 MLP",
                "`GrowMLP`: `Widen(ffn=...)`",
                describe_new_entries(*units.news),
                "[pad](#pad)",
            ),
            (
                "3.2 head addition",
                "`AddHeads`: `Widen(heads=..., kv_heads=...)`",
                describe_new_entries(*heads[0].news),
                "[more heads](#more-heads)",
            ),
            (
                "3.3 heads (values)",
                "`GrowHeadDim`: `Widen(head_dim=...)`, with 3.4",
                describe_new_entries(v, o),
                "[wider heads](#wider-heads)",
            ),
            (
                "3.4 attention (queries, keys)",
                "`GrowHeadDim`: `Widen(head_dim=...)`, with 3.3",
                describe_new_entries(q, k),
                "[wider heads](#wider-heads)",
            ),
            ("3.5 hidden dimension", "`GrowHidden`: `Widen(hidden=...)`", stream, "[pad](#pad)"),
            ("3.6 layer addition", "`AddLayers`: `Deepen(...)`", layer, "[identity](#identity)"),
        ]
        head = ["| in the paper | step | new entries | picture |", "|---|---|---|---|"]
        return [
            "## The six composable expansions",
            COMPOSABLE.replace("\n", " "),
            "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]),
            "### more heads",
            describe_function(f"growth.sizes.{solving.head_layout.__name__}", solving.head_layout),
            self.image("heads", f"2 to 3 heads: {describe_scenes(heads)}", lambda: picture(heads)),
            "### wider heads",
            describe_function(f"growth.rotary.{rotary.widen_rotary.__name__}", rotary.widen_rotary),
            self.image(
                "head_dim",
                f"heads of 2 to heads of 4: {describe_scenes(wider)}",
                lambda: picture(wider),
            ),
        ]


def overview_section() -> list[str]:
    """Everything at a glance."""
    rows = [
        f"| [`{name}`](#{name}) | {one.does} | {one.preserves} | {one.papers_text} |"
        for table in (WIDTH, DEPTH)
        for name, one in table.items()
    ]
    return [
        "# Gallery: the operators of growth",
        (
            "What each operator does to a small matrix, what it preserves, where it comes from and"
            " when to use it. Every\npicture shows a tiny model that the operator itself has grown:"
            " [how](#how-this-page-is-made)."
        ),
        "\n".join(
            ["| operator | what it does | keeps the logits | paper |", "|---|---|---|---|", *rows]
        ),
    ]


def sources_section() -> list[str]:
    """Sources, and how to make the page again."""
    how = (__doc__ or "").split("\n\n")[1]
    return [
        "## How this page is made",
        " ".join(how.split()),
        (
            "The algebra is in [Expansions](concepts/expansions.md) and [LiGO](concepts/ligo.md)."
            " Figures are those that the named papers report; none was measured for this page."
        ),
        (
            "After a change of an operator or of its words, write the page and its pictures again "
            "(`tests/docs/test_gallery.py` fails until then):"
        ),
        "```\npython docs/tools/gallery.py\n```",
    ]


def write(folder: Path) -> Page:
    """Write gallery.md and its pictures into a folder, whose older pictures go."""
    page = Page()
    pictures = folder / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    for stale in {file.name for file in pictures.glob("*.svg")} - set(page.pictures):
        (pictures / stale).unlink()
    for name, draw in page.pictures.items():
        (pictures / name).write_bytes(draw())
    (folder / "gallery.md").write_text(page.text, encoding="utf-8")
    return page


def main() -> None:
    """Write the page beside this script, or elsewhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args()
    page = write(options.out)
    print(f"wrote {options.out}/gallery.md and {len(page.pictures)} pictures")


if __name__ == "__main__":
    main()
