"""From asked sizes to a widening: an expansion per axis, and what norms and activations allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..core import axes
from ..core.axes import Expansion
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from . import rotary
from .operators import WIDTH
from .sizes import WidthSizes, solve_sizes
from .widening import DEAD, LIVE, Widening

WIDTH_OPERATORS = tuple(WIDTH)
NOISE = {
    "tile": 0.1,
    "duplicate": 0.1,
    "aki": 0.1,
    "lemon": 0.5,
}  # relative to a tensor's own spread
PLACES = ("hidden", "ffn", "heads", "head_dim")


def parse_width_operators(text: str) -> dict[str, str]:
    """`tile`, or `hidden=tile,ffn=pad`, as an operator for each of PLACES; RegraftError names what
    is unknown.
    """
    table = dict.fromkeys(PLACES, "pad")
    for item in text.split(","):
        place, equals, how = item.strip().rpartition("=")
        if how not in WIDTH_OPERATORS:
            raise RegraftError(
                f"unknown operator '{how}' in --width-init '{text}': use one of"
                f" {', '.join(WIDTH_OPERATORS)}"
            )
        if equals and place not in PLACES:
            raise RegraftError(
                f"--width-init '{text}' names no axis '{place}': use one of {', '.join(PLACES)}"
            )
        table |= {place: how} if equals else dict.fromkeys(PLACES, how)
    return table


def build_widening(
    source: Checkpoint,
    asked: WidthSizes,
    how: str = "pad",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    seed: int = 0,
) -> Widening:
    """The widening of a checkpoint to the asked sizes; RegraftError says what cannot be and the
    nearest that can.
    """
    anatomy, old = source.anatomy, source.sizes
    host = anatomy.host_config(source.config)
    sizes, split = solve_sizes(source, asked)
    if noise is not None and not 0 <= noise < float("inf"):
        raise RegraftError(
            f"--noise {noise} is no spread: give 0 for none, or a number such as 0.1"
        )
    ways = parse_width_operators(how)
    table: dict[str, Expansion] = {}
    made = Widening(source, source.config, sizes, table, split, "stream", 0.0, seed)
    table["hidden"] = stream_axis(made, old["hidden"], sizes["hidden"], ways["hidden"], seed)
    table |= unit_axes(old, sizes, split, ways, seed)
    keys, table["qk"] = rotary.widen_rotary(made.family, host, old["dim"], sizes["dim"])
    qk_norm = qk_norm_mode(made, table)
    config = anatomy.resize_config(source.config, sizes, extra=keys)
    check_activation(source, ways, sizes)
    made_by = ways | (
        {"hidden": "tile"} if table["hidden"].name == "tile" else {}
    )  # post-norm families always tile
    copies = [NOISE.get(made_by[place], 0.0) for place in PLACES if has_grown(place, old, sizes)]
    kind = choose_fold(made, fold)
    heard = max([0.0, *copies]) if noise is None else noise
    done = replace(made, config=config, fold=kind, noise=heard, qk_norm=qk_norm)
    if done.eps is None:
        return done
    return replace(
        done,
        config=anatomy.resize_config(
            source.config, sizes, extra={**keys, made.family.eps: done.eps}
        ),
    )


def build_inexact_widening(
    source: Checkpoint, asked: WidthSizes, seed: int = 0, folds: bool = True
) -> Widening:
    """A padded widening to sizes that need not be exact, for operators that do not keep the
    function anyway.

    `folds`: whether the config's epsilon makes up for another mean square of the stream.
    """
    sizes, split = solve_sizes(source, asked)
    table = unit_axes(source.sizes, sizes, split, parse_width_operators("pad"), seed)
    table["hidden"] = axes.pad(source.sizes["hidden"], sizes["hidden"], "reads")
    made = Widening(source, source.config, sizes, table, split, "stream", 0.0, seed)
    host = source.anatomy.host_config(source.config)
    keys, table["qk"] = rotary.widen_rotary(made.family, host, source.sizes["dim"], sizes["dim"])
    done = replace(made, axes=table, fold=choose_fold(made, "auto"))
    extra = keys if done.eps is None or not folds else {**keys, made.family.eps: done.eps}
    return replace(done, config=source.anatomy.resize_config(source.config, sizes, extra=extra))


def widening_notes(made: Widening, asked: WidthSizes) -> list[str]:
    """What a user should know of a widening beyond its sizes: sizes that followed, entries that
    cannot learn.
    """
    old, new = made.source.sizes, made.sizes
    found = []
    before, after = old["kv"] * old["group"], new["kv"] * new["group"]
    if asked.heads is None and asked.kv_heads is None and after != before:
        found.append(
            f"{before} heads became {after}: {made.family.family} wants hidden and heads to fit"
            " each other"
        )
    if made.qk_norm == DEAD:
        times = -(-new["dim"] // old["dim"]) * old["dim"]
        found.append(
            f"query and key norms keep the {new['dim'] - old['dim']} new coordinates of every query"
            f" and key at zero for ever: --head-dim {times} keeps all of them alive"
        )
    return found


def has_grown(place: str, old: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether an axis of PLACES grew."""
    names = {"heads": ("kv", "group"), "head_dim": ("dim",)}.get(place, (place,))
    return any(old[name] != sizes[name] for name in names)


def unit_axes(
    old: Mapping[str, int], sizes: Mapping[str, int], split: int, ways: Mapping[str, str], seed: int
) -> dict[str, Expansion]:
    """Expansions of the axes whose coordinates are units of their own: neurons, heads, value
    coordinates.
    """
    inner = ways["head_dim"] if ways["head_dim"] in ("zero_in", "pair") else "pad"
    queries = (
        "pad" if ways["heads"] == "zero_in" else ways["heads"]
    )  # values have no axis of queries to silence
    return {
        "ffn": unit_axis(ways["ffn"], old["ffn"], sizes["ffn"], seed, "ffn"),
        "kv": unit_axis(ways["heads"], old["kv"] * split, sizes["kv"], seed, "heads"),
        "group": unit_axis(queries, old["group"] // split, sizes["group"], seed, "heads"),
        "dim": unit_axis(inner, old["dim"], sizes["dim"], seed),
    }


def unit_axis(how: str, old: int, new: int, seed: int, place: str = "") -> Expansion:
    """The expansion of an axis of units by an operator's name; RegraftError names its one of
    PLACES.
    """
    if new == old:
        return axes.identity(old)
    if how in ("pad", "zero_in", "pair"):
        return axes.pad(old, new, "reads" if how == "zero_in" else "writes", pairs=how == "pair")
    if how == "tile":
        if new % old:
            raise RegraftError(
                f"tile makes whole copies: {place} {new} is no multiple of {old}; use"
                f" {new // old * old} or {-(-new // old) * old}, or --width-init lemon"
            )
        return axes.tile(old, new)
    if how in ("split", "lemon"):
        return axes.split(old, new, seed)
    return axes.duplicate(old, new, seed, following=how == "aki")


def stream_axis(made: Widening, old: int, new: int, how: str, seed: int) -> Expansion:
    """The expansion of the residual stream by an operator's name."""
    if new == old:
        return axes.identity(old)
    post = any(p.norm and p.axes.kind == "bias" and p.writes == "stream" for p in made.parts)
    if how == "aki":
        return axes.duplicate(old, new, seed, following=True)

    # Behind a norm that follows the sum, the stream itself is a norm's output: only whole copies
    # keep its mean and variance (docs/concepts/expansions.md, L9).
    exact = how in ("tile", "duplicate") or post
    if exact and new % old:
        near = sorted({max(1, new // old) * old, -(-new // old) * old})
        why = (
            "its norms come after each sum"
            if post
            else f"--width-init {how} copies the stream evenly or not at all"
        )
        raise RegraftError(
            f"{made.anatomy.family} cannot have hidden {new} exactly, {why}: use --hidden"
            f" {' or '.join(map(str, near))}"
            + ("" if post else ", or --width-init hidden=pad or hidden=lemon for any width")
        )
    if how == "duplicate":
        return axes.duplicate(old, new, seed)
    if exact:
        return axes.tile(old, new)
    return axes.rounds(old, new) if how == "lemon" else axes.pad(old, new, "reads")


def choose_fold(made: Widening, fold: str) -> Literal["stream", "eps"]:
    """How the mean square of a padded stream is kept; RegraftError when `eps` is asked for and
    cannot be.
    """
    others = [
        p.axes.text
        for p in made.parts
        if p.norm and p.axes.kind == "gain" and "hidden" not in p.axes.outputs[0]
    ]
    if fold == "eps" and others:
        raise RegraftError(
            f"{made.anatomy.family} has one epsilon for norms over hidden and for '{others[0]}',"
            " which grow apart: use --fold stream"
        )
    return "stream" if others or fold == "stream" else "eps"


def qk_norm_mode(made: Widening, table: Mapping[str, Expansion]) -> str | None:
    """How normed queries and keys take wider heads: LIVE for multiples, DEAD (new coordinates stay
    zero) otherwise.
    """
    norms = [p for p in made.parts if p.norm and "dim" in p.axes.outputs[0]]
    if not norms:
        return None
    old, new = table["qk"].old, table["qk"].new
    if new != old and any(p.axes.kind == "bias" for p in norms):
        raise RegraftError(
            f"{made.anatomy.family}'s query and key norms subtract the mean of a head, so"
            f" --head-dim {new} cannot keep what they give: leave it at {old} and grow --heads,"
            " --hidden, --ffn or --layers"
        )
    for axis in ("kv", "group") if made.has_full_qk_norm else ():
        if table[axis].new % table[axis].old or table[axis].copies != 1:
            times = -(-table[axis].new // table[axis].old)
            raise RegraftError(
                f"{made.anatomy.family} norms all heads together, so heads come in whole multiples"
                f" by --width-init heads=pad, not {table[axis].old} to {table[axis].new}: use"
                f" {times} times as many"
            )
    return DEAD if new % old else LIVE


def check_activation(source: Checkpoint, ways: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """RegraftError when silent inputs would stay silent for ever."""
    if ways["ffn"] == "zero_in" and sizes["ffn"] != source.sizes["ffn"]:
        anatomy = source.anatomy.host(source.config)
        gated = any(role.split(".")[-2] == "gate" for role, _ in source.tensors)
        name = str(source.anatomy.fill_defaults(source.config).get(anatomy.activation, ""))
        if name.startswith("relu") and not gated:
            raise RegraftError(
                f"units whose inputs are zero never wake up under {name}: use --width-init ffn=pad,"
                " pair or split"
            )
