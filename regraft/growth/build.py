"""From the sizes in a request to a widening: an expansion per axis, and what norms and activations
allow.
"""

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
from .sizes import solve_sizes
from .target_sizes import WidthSizes
from .widening import DEAD, LIVE, QkNorm, Widening

WIDTH_OPERATORS = tuple(WIDTH)
# Sizes that have a width operator of their own, as `--width-init` names them.
OPERATOR_SIZES = ("hidden", "ffn", "heads", "head_dim")
# Noise that keeps copies from staying identical, by operator: its standard deviation relative to
# the tensor's own.
NOISE = {"tile": 0.1, "duplicate": 0.1, "aki": 0.1, "lemon": 0.5}


def parse_width_operators(text: str) -> dict[str, str]:
    """The operator of each of OPERATOR_SIZES in the value of `--width-init`.

    RegraftError names the operator or size that is unknown.

    Args:
        text: one operator for all sizes (`tile`), or some by name (`hidden=tile,ffn=pad`); a size
            that is not named is padded. Later items win.
    """
    operators = dict.fromkeys(OPERATOR_SIZES, "pad")
    for item in text.split(","):
        # Without an equals sign the item is an operator for all sizes.
        size, equals, operator = item.strip().rpartition("=")

        if operator not in WIDTH_OPERATORS:
            raise RegraftError(
                f"unknown operator '{operator}' in --width-init '{text}': use one of"
                f" {', '.join(WIDTH_OPERATORS)}"
            )
        if equals and size not in OPERATOR_SIZES:
            raise RegraftError(
                f"--width-init '{text}' names no axis '{size}': use one of"
                f" {', '.join(OPERATOR_SIZES)}"
            )
        operators |= {size: operator} if equals else dict.fromkeys(OPERATOR_SIZES, operator)
    return operators


def build_widening(
    source: Checkpoint,
    request: WidthSizes,
    how: str = "pad",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    seed: int = 0,
) -> Widening:
    """The widening of a checkpoint to the requested sizes.

    RegraftError says what the class cannot hold exactly and the nearest sizes that it can.

    Args:
        source: the checkpoint to widen.
        request: the target's sizes; those left open follow or stay.
        how: operators, as `parse_width_operators` reads them.
        fold: how norms over a padded stream keep their mean square (`Widening.fold`); `auto` takes
            `eps` where the class allows it.
        noise: standard deviation of the noise of readers of copies, relative to the tensor's own;
            None: what the operators need (NOISE).
        seed: of random entries, copies and noise.
    """
    anatomy, old = source.anatomy, source.sizes
    sizes, split = solve_sizes(source, request)
    if noise is not None and not 0 <= noise < float("inf"):
        raise RegraftError(
            f"--noise {noise} is no spread: give 0 for none, or a number such as 0.1"
        )
    operators = parse_width_operators(how)

    # An expansion for every axis. The first widening has none yet: it answers what norms there are.
    widening = Widening(source, source.config, sizes, {}, split, "stream", 0.0, seed)
    family = widening.family
    stream = stream_axis(widening, old["hidden"], sizes["hidden"], operators["hidden"], seed)
    units = unit_axes(old, sizes, split, operators, seed)
    host = anatomy.text_config(source.config)
    rotary_keys, query_key = rotary.widen_rotary(family, host, old["dim"], sizes["dim"])
    table = {"hidden": stream, **units, "qk": query_key}

    # What the class and its activation cannot hold raises here, before anything is computed.
    qk_norm = qk_norm_mode(widening, table)
    config = anatomy.resize_config(source.config, sizes, extra=rotary_keys)
    check_activation(source, operators, sizes)

    widening = replace(
        widening,
        config=config,
        axes=table,
        fold=choose_fold(widening, fold),
        noise=default_noise(operators, table, old, sizes) if noise is None else noise,
        qk_norm=qk_norm,
    )
    if widening.eps is None:
        return widening
    keys = {**rotary_keys, family.eps: widening.eps}
    return replace(widening, config=anatomy.resize_config(source.config, sizes, extra=keys))


def default_noise(
    operators: Mapping[str, str],
    table: Mapping[str, Expansion],
    old: Mapping[str, int],
    sizes: Mapping[str, int],
) -> float:
    """The largest noise that an operator of an axis that grows needs.

    Args:
        operators: an operator for each of OPERATOR_SIZES.
        table: the expansions of axes.
        old: axis sizes of the source.
        sizes: axis sizes of the target.
    """
    # Post-norm families tile the stream whatever operator is requested.
    if table["hidden"].name == "tile":
        operators = {**operators, "hidden": "tile"}
    grown = [operators[size] for size in OPERATOR_SIZES if has_grown(size, old, sizes)]
    return max([0.0, *(NOISE.get(operator, 0.0) for operator in grown)])


def build_inexact_widening(
    source: Checkpoint, request: WidthSizes, seed: int = 0, folds: bool = True
) -> Widening:
    """A padded widening to sizes that need not be exact, for operators that do not keep the
    function anyway.

    RegraftError when the class cannot hold the sizes at all.

    Args:
        source: the checkpoint to widen.
        request: the target's sizes; those left open follow or stay.
        seed: of random entries.
        folds: whether the config's epsilon makes up for another mean square of the stream.
    """
    old = source.sizes
    sizes, split = solve_sizes(source, request)
    operators = parse_width_operators("pad")
    units = unit_axes(old, sizes, split, operators, seed)
    stream = axes.pad(old["hidden"], sizes["hidden"], "reads")

    widening = Widening(source, source.config, sizes, {}, split, "stream", 0.0, seed)
    family, host = widening.family, source.anatomy.text_config(source.config)
    keys, query_key = rotary.widen_rotary(family, host, old["dim"], sizes["dim"])
    table = {**units, "hidden": stream, "qk": query_key}

    widening = replace(widening, axes=table, fold=choose_fold(widening, "auto"))
    if folds and widening.eps is not None:
        keys = {**keys, family.eps: widening.eps}
    return replace(widening, config=source.anatomy.resize_config(source.config, sizes, extra=keys))


def widening_notes(widening: Widening, request: WidthSizes) -> list[str]:
    """What a user should know of a widening beyond its sizes: sizes that followed, entries that
    cannot learn.
    """
    old, new = widening.source.sizes, widening.sizes
    notes = []
    before, after = old["kv"] * old["group"], new["kv"] * new["group"]
    if request.heads is None and request.kv_heads is None and after != before:
        notes.append(
            f"{before} heads became {after}: in {widening.family.family} the hidden size must be"
            " the number of heads times the size of a head"
        )

    if widening.qk_norm == DEAD:
        multiple = -(-new["dim"] // old["dim"]) * old["dim"]
        notes.append(
            f"query and key norms keep the {new['dim'] - old['dim']} new coordinates of every query"
            f" and key at zero for ever: --head-dim {multiple} keeps all of them alive"
        )
    return notes


def has_grown(size: str, old: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether one of OPERATOR_SIZES differs between two tables of axis sizes."""
    names = {"heads": ("kv", "group"), "head_dim": ("dim",)}.get(size, (size,))
    return any(old[name] != sizes[name] for name in names)


def unit_axes(
    old: Mapping[str, int],
    sizes: Mapping[str, int],
    split: int,
    operators: Mapping[str, str],
    seed: int,
) -> dict[str, Expansion]:
    """Expansions of the axes whose coordinates are units: neurons, heads, coordinates of values.

    Args:
        old: axis sizes of the source.
        sizes: axis sizes of the target.
        split: into how many heads every key/value head is split first.
        operators: an operator for each of OPERATOR_SIZES.
        seed: of copies that are drawn at random.
    """
    # Coordinates of heads are never copied: operators that copy pad them.
    values = operators["head_dim"] if operators["head_dim"] in ("zero_in", "pair") else "pad"
    # zero_in silences heads by their values, which have no axis of queries.
    queries = "pad" if operators["heads"] == "zero_in" else operators["heads"]

    return {
        "ffn": unit_axis(operators["ffn"], old["ffn"], sizes["ffn"], seed, "ffn"),
        "kv": unit_axis(operators["heads"], old["kv"] * split, sizes["kv"], seed, "heads"),
        "group": unit_axis(queries, old["group"] // split, sizes["group"], seed, "heads"),
        "dim": unit_axis(values, old["dim"], sizes["dim"], seed),
        "inner": unit_axis("pad", old.get("inner", 1), sizes.get("inner", 1), seed),
    }


def unit_axis(operator: str, old: int, new: int, seed: int, size: str = "") -> Expansion:
    """The expansion of an axis of units; RegraftError when `tile` gets no whole multiple.

    Args:
        operator: its name, one of WIDTH_OPERATORS.
        old: size before.
        new: size after.
        seed: of copies that are drawn at random.
        size: which of OPERATOR_SIZES it is, for the message.
    """
    if new == old:
        return axes.identity(old)

    # New units: silent at first, free on the other side (L1).
    if operator in ("pad", "zero_in", "pair"):
        free: Literal["reads", "writes"] = "reads" if operator == "zero_in" else "writes"
        return axes.pad(old, new, free, pairs=operator == "pair")

    # Copies of old units, which share their outputs.
    if operator == "tile":
        if new % old:
            raise RegraftError(
                f"tile makes whole copies: {size} {new} is no multiple of {old}; use"
                f" {new // old * old} or {-(-new // old) * old}, or --width-init lemon"
            )
        return axes.tile(old, new)
    if operator in ("split", "lemon"):
        return axes.split(old, new, seed)
    return axes.duplicate(old, new, seed, following=operator == "aki")


def stream_axis(widening: Widening, old: int, new: int, operator: str, seed: int) -> Expansion:
    """The expansion of the residual stream; RegraftError when only whole multiples are exact.

    Args:
        widening: answers which norms the model has.
        old: hidden size before.
        new: hidden size after.
        operator: its name, one of WIDTH_OPERATORS.
        seed: of copies that are drawn at random.
    """
    if new == old:
        return axes.identity(old)
    if widening.family.bare_norms and widening.has_tied_head:
        raise RegraftError(
            f"{widening.anatomy.family} has norms without gains and a head tied to its embedding,"
            f" which keep hidden at {old}: grow --heads, --ffn or --layers"
        )
    if operator == "aki":
        return axes.duplicate(old, new, seed, following=True)

    # Behind a norm that follows the sum, the stream itself is a norm's output: only whole copies
    # keep its mean and variance (docs/concepts/expansions.md, L9).
    post_norm = any(part.subtracts_mean and part.writes == "stream" for part in widening.parts)
    # An activation keeps copies alone: not a mean of coordinates, nor a factor.
    activated = any(part.writes == "activated" for part in widening.parts)
    needs_whole_copies = operator in ("tile", "duplicate") or post_norm or activated
    if needs_whole_copies and new % old:
        near = sorted({max(1, new // old) * old, -(-new // old) * old})
        why = (
            "its norms come after each sum"
            if post_norm
            else "an activation or a second norm takes all of its coordinates"
            if activated
            else f"--width-init {operator} copies the stream evenly or not at all"
        )
        raise RegraftError(
            f"{widening.anatomy.family} cannot have hidden {new} exactly, {why}: use --hidden"
            f" {' or '.join(map(str, near))}"
            + (
                ""
                if post_norm or activated
                else ", or --width-init hidden=pad or hidden=lemon for any width"
            )
        )

    if operator == "duplicate":
        return axes.duplicate(old, new, seed)
    if needs_whole_copies:
        return axes.tile(old, new)
    return axes.rounds(old, new) if operator == "lemon" else axes.pad(old, new, "reads")


def choose_fold(widening: Widening, fold: str) -> Literal["stream", "eps"]:
    """How the mean square of a padded stream is kept (L2).

    RegraftError when `fold` is `eps` and the class cannot change its epsilon.
    """
    # One epsilon in the config serves all norms; those over other axes must keep the old one.
    other_norms = [
        part.axes.text
        for part in widening.parts
        if part.norm and part.axes.kind != "bias" and "hidden" not in part.axes.outputs[0]
    ]
    if fold == "eps" and other_norms:
        raise RegraftError(
            f"{widening.anatomy.family} has one epsilon for norms over hidden and for"
            f" '{other_norms[0]}', which grow apart: use --fold stream"
        )
    fixed = widening.family.eps.startswith("_")
    if fold == "eps" and fixed:
        raise RegraftError(
            f"{widening.anatomy.family} has no config key for the epsilon of its norms: use --fold"
            " stream"
        )
    return "stream" if other_norms or fixed or fold == "stream" else "eps"


def qk_norm_mode(widening: Widening, table: Mapping[str, Expansion]) -> QkNorm | None:
    """How normed queries and keys take wider heads (L7): LIVE for multiples, DEAD otherwise; None
    when they have no norm.

    RegraftError when the norms cannot keep what they give.

    Args:
        widening: answers which norms the model has.
        table: the expansions of axes.
    """
    norms = [part for part in widening.parts if part.norm and "dim" in part.axes.outputs[0]]
    if not norms:
        return None

    old, new = table["qk"].old, table["qk"].new
    if new != old and any(part.subtracts_mean for part in norms):
        raise RegraftError(
            f"{widening.anatomy.family}'s query and key norms subtract the mean of a head, so"
            f" --head-dim {new} cannot keep what they give: leave it at {old} and grow --heads,"
            " --hidden, --ffn or --layers"
        )

    # A norm over all heads at once (OLMo 2) keeps its mean square only over whole sets of them.
    for axis in ("kv", "group") if widening.has_full_qk_norm else ():
        expansion = table[axis]
        if expansion.new % expansion.old or expansion.copies != 1:
            raise RegraftError(
                f"{widening.anatomy.family} norms all heads together, so heads come in whole"
                f" multiples by --width-init heads=pad, not {expansion.old} to {expansion.new}: use"
                f" {-(-expansion.new // expansion.old)} times as many"
            )
        # Both heads of a pair have the queries and keys of one old head.
        times = expansion.new // expansion.old
        if expansion.pairs and expansion.old > 1 and times % 2 == 0:
            raise RegraftError(
                f"{widening.anatomy.family} norms all heads together, so pairs of new heads come in"
                f" two whole sets, not in {expansion.old} to {expansion.new}: use {times + 1} times"
                " as many, or --width-init heads=pad"
            )
    return DEAD if new % old else LIVE


def check_activation(
    source: Checkpoint, operators: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    """RegraftError when neurons with zero inputs would never learn."""
    if operators["ffn"] != "zero_in" or sizes["ffn"] == source.sizes["ffn"]:
        return

    # ReLU has gradient zero at zero. Behind a gate only `up` is zero, and the gate is alive.
    anatomy = source.anatomy.host(source.config)
    gated = any(role.split(".")[-2] == "gate" for role, _ in source.tensors)
    name = str(source.anatomy.fill_defaults(source.config).get(anatomy.activation, ""))
    if name.startswith("relu") and not gated:
        raise RegraftError(
            f"units whose inputs are zero never wake up under {name}: use --width-init ffn=pad,"
            " pair or split"
        )
