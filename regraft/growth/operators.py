"""Every operator of growth by name: what it does, what it preserves, where it comes from and when
to use it.

The choices of `--width-init` and `--depth-init`, the steps' docstrings and the gallery
(docs/gallery.md) are made from these tables. What papers report is theirs, not measured here.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Step = TypeVar("Step")

PRESERVES = {
    "exactly": (
        "the logits, bit for bit (families whose norms come after the sum: up to the norms'"
        " epsilon)"
    ),
    "up to rounding": "the logits, up to rounding",
    "not": "nothing exactly",
}
# What [E] and [L] in the tables cite.
NOTES = {"E": "docs/concepts/expansions.md, section 6", "L": "docs/concepts/ligo.md, section 4"}
PAPERS = {
    "composable": ("composable expansions", "arXiv 2308.06103"),
    "net2net": ("Net2Net", "arXiv 1511.05641"),
    "bert2bert": ("bert2BERT", "arXiv 2110.07143"),
    "lemon": ("LEMON", "arXiv 2310.07999"),
    "hypercloning": ("HyperCloning", "arXiv 2409.12903"),
    "llama_pro": ("LLaMA-Pro", "arXiv 2401.02415"),
    "stackbert": ("StackBERT", "Gong et al., ICML 2019"),
    "gstack": ("G_stack", "arXiv 2405.15319"),
    "multilevel": ("multi-level residual networks", "arXiv 1710.10348"),
    "midas": ("MIDAS", "arXiv 2409.19044"),
    "solar": ("SOLAR", "arXiv 2312.15166"),
    "mslt": ("MSLT", "arXiv 2011.13635"),
}


@dataclass(frozen=True)
class Operator:
    """What is known of one operator."""

    # What it does, in a line.
    does: str
    # How well it keeps the function, a key of PRESERVES.
    preserves: Literal["exactly", "up to rounding", "not"]
    # Where it comes from, keys of PAPERS.
    papers: tuple[str, ...]
    # When to use it; [E] and [L] cite NOTES.
    when: str

    @property
    def papers_text(self) -> str:
        """The papers, each with where it is."""
        return "; ".join(", ".join(PAPERS[key]) for key in self.papers) or "none of its own"


def list_papers(table: Mapping[str, Operator], names: Iterable[str]) -> list[str]:
    """The papers of some operators of a table, each once, with where it is.

    Args:
        table: WIDTH or DEPTH.
        names: operators of it.
    """
    keys = dict.fromkeys(key for name in names for key in table[name].papers)
    return [", ".join(PAPERS[key]) for key in keys]


# What `--width-init auto` takes, for width and for depth: of the best starts from one source in
# docs/comparison.md's runs the exact one; behind post-norms, where exact growth means copies that
# are alike, a direct copy is far ahead of it.
AUTO, AUTO_POST_NORM = ("pad", "identity"), ("copy", "identity")
WIDTH = {
    "pad": Operator(
        "new units take random inputs and give zero outputs; the stream's new coordinates hold"
        " zeros, or averages under a LayerNorm, and are read at random",
        "up to rounding",
        ("composable",),
        "The default, for any size: nothing is copied, so nothing stays symmetric, and of every two"
        " matrices only one starts at zero, so nothing is dead. The best exact start of the small"
        " experiment in the notes [E], which is too short to rank final quality.",
    ),
    "zero_in": Operator(
        "new units take zero inputs and give random outputs",
        "up to rounding",
        (),
        "The mirror image of `pad`, for outputs whose weights should start at random. Under a gated"
        " MLP only the gated factor is zero; under ReLU without a gate such units would never wake"
        " up, so that is refused. The notes [E] saw no gain over `pad`.",
    ),
    "pair": Operator(
        "new units come in twos with the same random inputs and opposite random outputs",
        "up to rounding",
        ("lemon",),
        "When no new weight should start at zero: every entry gets a gradient from the first step"
        " on. LEMON calls such weights cancelling. The notes [E] saw no gain over `pad`.",
    ),
    "split": Operator(
        "new units are copies taken in turn, their outputs shared unevenly",
        "up to rounding",
        ("lemon", "net2net"),
        "When new units should start as useful as old ones: uneven shares let copies part without"
        " noise. A little behind `pad` in the notes' small experiment [E].",
    ),
    "tile": Operator(
        "whole copies of the axis, one after the other, read in equal shares",
        "up to rounding",
        ("hypercloning",),
        "For whole multiples. HyperCloning's authors report training up to 4 times faster than from"
        " scratch. Shared weights are smaller, so under an unchanged learning rate their steps are"
        " relatively larger; in the notes' small experiment [E] dividing that rate by the number of"
        " copies made up for most of what `tile` lost. Keep the noise on: without it the copies"
        " never part.",
    ),
    "duplicate": Operator(
        "copies of units drawn at random, read in equal shares",
        "up to rounding",
        ("net2net", "bert2bert"),
        "To compare with the literature: the classic function-preserving start. Keep the noise on,"
        " and lower the learning rate as for `tile` [E].",
    ),
    "aki": Operator(
        "as `duplicate`, but further copies are written as in the next layer",
        "not",
        ("bert2bert",),
        "When a faster descent matters more than the start. bert2BERT's authors report it ahead of"
        " their exact start, and the whole method to save about 45 % of BERT-Base's and 47 % of"
        " GPT-Base's training cost; AquilaMoE (arXiv 2408.06567) measured a far worse loss right"
        " after growth [L].",
    ),
    "lemon": Operator(
        "as many whole copies of the stream as fit, then zeros, or averages under a LayerNorm;"
        " units as `split`",
        "up to rounding",
        ("lemon",),
        "When copies are wanted at a width that is no multiple. LEMON's authors report 56.7 % less"
        " training cost for Vision Transformers and 33.2 % for BERT than from scratch, with a"
        " learning rate that decays faster [L].",
    ),
}
DEPTH = {
    "identity": Operator(
        "new layers, spread evenly, whose outputs are zero (or the gains of the norms behind them),"
        " the rest random",
        "exactly",
        ("composable", "net2net"),
        "The default: nothing is lost at the start, and of every two matrices only one starts at"
        " zero. In the notes' small experiment [E] it ended ahead of `stack` at one learning rate"
        " and behind it at the other.",
    ),
    "llama_pro": Operator(
        "as `identity`, but the rest of a new layer is a copy of the layer below",
        "exactly",
        ("llama_pro",),
        "To teach a finished model something new: its authors train the new layers alone, so that"
        " the old ones forget less, and made an 8.3B model of Llama 2 7B.",
    ),
    "stack": Operator(
        "all layers again from the bottom until the number is reached",
        "not",
        ("stackbert",),
        "To double a shallow model early in pre-training. LiGO (arXiv 2303.00980) measured 34.1 %"
        " fewer FLOPs than from scratch for BERT-Small to BERT-Base.",
    ),
    "gstack": Operator(
        "the whole model a whole number of times",
        "not",
        ("gstack",),
        "For long pre-training, where the start is soon forgotten: the best of four kinds of"
        " operators in its authors' comparison; at 7B they reach with 194B tokens the loss that"
        " training from scratch reaches with 300B.",
    ),
    "interpolate": Operator(
        "layers repeated in place, spread evenly",
        "not",
        ("multilevel",),
        "When the start should not be far off without being exact: AquilaMoE (arXiv 2408.06567),"
        " growing 1.3B to 7B by an exact widening and then in depth, started at a loss of 3.31 with"
        " it and of 4.30 with stacking [L].",
    ),
    "midas": Operator(
        "the block of layers in the middle twice",
        "not",
        ("midas",),
        "To grow by stages during pre-training: its authors report up to 40 % faster training and"
        " better reasoning at equal perplexity, at 1B, 2B and 8B.",
    ),
    "upscale": Operator(
        "the lower layers of one copy, then the upper layers of another, overlapping in the middle",
        "not",
        ("solar",),
        "To make a larger model of a finished one and pre-train it further: SOLAR's 48 layers come"
        " from two copies of 32 without the last, or first, 8.",
    ),
    "mslt": Operator(
        "the top layers once more on top",
        "not",
        ("mslt",),
        "To train in stages, the new top layers alone at first: its authors report more than 110 %"
        " faster training of BERT; LiGO (arXiv 2303.00980) measured 34.9 % fewer FLOPs than from"
        " scratch.",
    ),
}


def describe_operators(table: Mapping[str, Operator]) -> Callable[[type[Step]], type[Step]]:
    """A decorator that fills `{operators}`, `{papers}`, `{exact}` and `{inexact}` of a step's
    docstring.

    The tables are the one source: docstrings, command line and gallery say the same.

    Args:
        table: WIDTH or DEPTH.
    """
    papers = dict.fromkeys(key for one in table.values() for key in one.papers)
    texts = {
        "{operators}": "\n".join(
            textwrap.fill(f"- `{name}`: {one.does}", 110, subsequent_indent="  ")
            for name, one in table.items()
        ),
        "{papers}": textwrap.fill("; ".join(", ".join(PAPERS[key]) for key in papers), 110),
        "{exact}": ", ".join(
            f"`{name}`" for name in operators_preserving(table, "exactly", "up to rounding")
        ),
        "{inexact}": ", ".join(f"`{name}`" for name in operators_preserving(table, "not")),
    }

    def fill_docstring(step: type[Step]) -> type[Step]:
        text = inspect.cleandoc(step.__doc__ or "")
        for field, value in texts.items():
            text = text.replace(field, value)
        step.__doc__ = text
        return step

    return fill_docstring


def operators_preserving(table: Mapping[str, Operator], *kinds: str) -> tuple[str, ...]:
    """Names of a table's operators that preserve one of `kinds`."""
    return tuple(name for name, one in table.items() if one.preserves in kinds)
