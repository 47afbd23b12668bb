"""Receipts: what `check` found, which of it must not be, and how a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from .liveness import DeadTensor, LockedTensor

if TYPE_CHECKING:
    from rich.console import Console


class Receipts(TypedDict):
    """The result of `check`. Differences of outputs are relative to the largest output."""

    # Whether everything that can be asked of the output is so, and the keys of what is not.
    holds: bool
    failed: list[str]
    # What source and result were read by: transformers' own classes.
    reference: str
    # Tokens of the random rows, what lies beyond them and why, and what was compared on them.
    reached_tokens: int
    reach_limited: str | None
    compared: list[str]
    # Whether a step changed weights by training. What training moves on purpose is then None.
    trained: bool
    # Source tensors found nowhere in the output, nor dropped with a reason.
    unaccounted: list[str]
    # Tensors and config keys that are not what the steps of lineage.json make of the source; None
    # where the steps cannot be done again, with the reason.
    unequal: list[str] | None
    config_differs: list[str] | None
    not_replayed: str | None
    # Whether lineage.json names this source by its hash.
    source_matches: bool
    # Outputs against the source's.
    rel_logit_diff: float | None
    max_abs_logit_diff: float | None
    # The source in regraft's own classes, with no layer linearized, against the source itself.
    zero_layers: float | None
    # Gated layers with their gates shut against the pure-window model.
    window_end: float | None
    # Windows against the stock attention in their place, and the layer that differs most.
    window_vs_stock: float | None
    window_vs_stock_layer: int | None
    # The source with windows as long as a row that has an image in it, against the source's logits;
    # None for models that read no images.
    image_vs_stock: NotRequired[float | None]
    # Token by token against all tokens at once; None for encoders.
    parallel_vs_recurrent: float | None
    # The same of the source, measured where the result's is above the bound: some classes do not
    # go on from a cache as they should.
    parallel_vs_recurrent_source: NotRequired[float]

    # Of stock results only, from here on. Whether every step keeps the function.
    exact: NotRequired[bool]
    # The residual stream between layers against the source's.
    hidden_diff: NotRequired[float | None]
    # Greedy tokens that agree with the source's from the start, of how many; None for encoders.
    greedy: NotRequired[int | None]
    greedy_tokens: NotRequired[int | None]
    # Where they part: how far the source's choice was ahead, relative to its largest logit.
    greedy_gap: NotRequired[float | None]
    # The largest `rel_logit_diff` that counts as equal.
    bound: NotRequired[float]
    # Entries that no gradient reaches, and those that the source has itself.
    dead: NotRequired[int | None]
    dead_source: NotRequired[int | None]
    dead_in: NotRequired[list[DeadTensor]]
    # Duplicate units that training cannot separate.
    locked: NotRequired[int | None]
    locked_in: NotRequired[list[LockedTensor]]


# Receipts that say what is wrong: empty where nothing is.
MUST_BE_EMPTY = ("unaccounted", "unequal", "config_differs")
MEANINGS = {
    "compared": "compared with the source as transformers loads both",
    "reached_tokens": "tokens of the random rows",
    "reach_limited": "not reached",
    "unaccounted": "source tensors found nowhere in the output",
    "unequal": "tensors that the recorded steps do not give",
    "config_differs": "config keys that the recorded steps do not give",
    "not_replayed": "steps not done again",
    "source_matches": "the source is the one that lineage.json names",
    "rel_logit_diff": "outputs against the source's, relative",
    "max_abs_logit_diff": "outputs against the source's, largest difference",
    "hidden_diff": "stream between layers against the source's, relative",
    "zero_layers": "linearizing no layer: logits against the source's",
    "window_end": "gates shut: logits against the pure-window model's",
    "window_vs_stock": "windows: outputs against the stock attention's, relative",
    "window_vs_stock_layer": "the layer that differs most",
    "image_vs_stock": "windows over a text with an image: logits against the source's",
    "parallel_vs_recurrent": "token by token against all at once",
    "parallel_vs_recurrent_source": "the same in the source, up to twice of which is its own",
    "exact": "every step keeps the function",
    "bound": "largest relative difference that counts as equal",
    "greedy": "greedy tokens that agree",
    "greedy_gap": "where they part: the source's choice ahead by, relative",
    "dead": "entries that no gradient reaches",
    "dead_source": "the source's own that its first gradient misses",
    "locked": "duplicate units that training cannot separate",
}


def find_failures(receipts: Mapping[str, Any], bounds: Mapping[str, float]) -> list[str]:
    """Keys of receipts that say that an output is not what it should be.

    Args:
        receipts: as of `check`.
        bounds: receipts that must be no more than a number; those that do not apply are None.
    """
    failed = [key for key in MUST_BE_EMPTY if receipts.get(key)]
    if not receipts["source_matches"]:
        failed.append("source_matches")
    # Not `value > bound`: NaN fails too.
    return failed + [
        key
        for key, bound in bounds.items()
        if receipts.get(key) is not None and not receipts[key] <= bound
    ]


def print_receipts(receipts: Mapping[str, Any], console: Console) -> None:
    """Show the result of `check` to a person; what fails is marked."""
    from rich.table import Table

    table = Table("", "receipt", "value", title="holds" if receipts["holds"] else "does NOT hold")
    is_stock = "exact" in receipts
    for name, meaning in MEANINGS.items():
        # Of a stock result, what does not apply is about linearization and left out.
        if name not in receipts or (receipts[name] is None and is_stock):
            continue
        if receipts[name] is None and name in ("not_replayed", "reach_limited", "image_vs_stock"):
            continue
        fails = name in receipts["failed"]
        value = format_receipt(receipts[name])
        if name == "greedy":
            value += f" of {receipts['greedy_tokens']}"
        table.add_row("FAILS" if fails else "", meaning, value, style="bold red" if fails else None)
    console.print(table)

    for row in [*receipts.get("dead_in", []), *receipts.get("locked_in", [])][:8]:
        kind = f"{row['dead']:,} dead" if "dead" in row else "duplicates"
        console.print(f"{kind}: {row['name']}, {row['where']}", soft_wrap=True, highlight=False)


def format_receipt(value: Any) -> str:
    """A receipt's value in a few characters."""
    if value is None:
        return "does not apply"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2e}"
    if isinstance(value, list):
        more = f" and {len(value) - 4} more" if len(value) > 4 else ""
        return ", ".join(value[:4]) + more if value else "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
