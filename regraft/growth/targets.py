"""From asked sizes to a widening: missing sizes filled in, constraints of the class enforced, an expansion per axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from .. import axes
from ..axes import Expansion
from ..checkpoint import Checkpoint
from ..errors import RegraftError
from . import rotary
from .operators import WIDTH
from .spaces import DEAD, LIVE, Widening

HOWS = tuple(WIDTH)
NOISE = {"tile": 0.1, "duplicate": 0.1, "lemon": 0.5}  # relative to a tensor's own spread
PLACES = ("hidden", "ffn", "heads", "head_dim")


@dataclass(frozen=True)
class Asked:
    """Sizes as a user gives them, None for those left open."""

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None


def hows(text: str) -> dict[str, str]:
    """`tile`, or `hidden=tile,ffn=pad`, as an operator for each of PLACES; RegraftError names what is unknown."""
    table = dict.fromkeys(PLACES, "pad")
    for item in text.split(","):
        place, equals, how = item.strip().rpartition("=")
        if how not in HOWS:
            raise RegraftError(f"unknown operator '{how}' in --how '{text}': use one of {', '.join(HOWS)}")
        if equals and place not in PLACES:
            raise RegraftError(f"--how '{text}' names no axis '{place}': use one of {', '.join(PLACES)}")
        table |= {place: how} if equals else dict.fromkeys(PLACES, how)
    return table


def widening(
    source: Checkpoint,
    asked: Asked,
    how: str = "pad",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    seed: int = 0,
) -> Widening:
    """The widening of a checkpoint to the asked sizes; RegraftError says what cannot be and the nearest that can."""
    anatomy, old = source.anatomy, source.sizes
    host = anatomy.host_config(source.config)
    sizes, split = solve(source, asked)
    ways = hows(how)
    table = unit_axes(old, sizes, split, ways, seed)
    made = Widening(source, source.config, sizes, table, split, "stream", 0.0, seed)
    table["hidden"] = stream_axis(made, old["hidden"], sizes["hidden"], ways["hidden"], seed)
    keys, table["qk"] = rotary.widened(made.family, host, old["dim"], sizes["dim"])
    config = anatomy.resized(source.config, sizes, extra=keys)
    check_activation(source, ways, sizes)
    copies = [NOISE.get(ways[place], 0.0) for place in PLACES if grew(place, old, sizes)]
    kind = folding(made, fold)
    qk_norm = query_norm(made, table)
    heard = max([0.0, *copies]) if noise is None else noise
    done = replace(made, config=config, fold=kind, noise=heard, qk_norm=qk_norm)
    if done.eps is None:
        return done
    return replace(done, config=anatomy.resized(source.config, sizes, extra={**keys, made.family.eps: done.eps}))


def notes(made: Widening, asked: Asked) -> list[str]:
    """What a user should know of a widening beyond its sizes: sizes that followed, entries that cannot learn."""
    old, new = made.source.sizes, made.sizes
    found = []
    before, after = old["kv"] * old["group"], new["kv"] * new["group"]
    if asked.heads is None and asked.kv_heads is None and after != before:
        found.append(f"{before} heads became {after}: {made.family.family} wants hidden and heads to fit each other")
    if made.qk_norm == DEAD:
        times = -(-new["dim"] // old["dim"]) * old["dim"]
        found.append(
            f"query and key norms keep the {new['dim'] - old['dim']} new coordinates of every query and key at zero "
            f"for ever: --head-dim {times} keeps all of them alive"
        )
    return found


def grew(place: str, old: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether an axis of PLACES grew."""
    names = {"heads": ("kv", "group"), "head_dim": ("dim",)}.get(place, (place,))
    return any(old[name] != sizes[name] for name in names)


def solve(source: Checkpoint, asked: Asked) -> tuple[dict[str, int], int]:
    """(axis sizes of the target, parts each key/value head is split into)."""
    old, anatomy = source.sizes, source.anatomy.host(source.config)
    heads_before = old["kv"] * old["group"]
    before = {"hidden": old["hidden"], "ffn": old["ffn"], "heads": heads_before, "kv_heads": old["kv"]}
    for name, size in {**before, "head_dim": old["dim"]}.items():
        wanted = getattr(asked, name)
        if wanted is not None and wanted < size:
            raise RegraftError(
                f"--{name.replace('_', '-')} {wanted} is smaller than the source's {size}: growth never shrinks, "
                f"give {size} or more"
            )
    hidden, heads, dim = asked.hidden or old["hidden"], asked.heads, asked.head_dim
    if coupled(source):
        hidden, heads, dim = couple(source, asked)
    elif anatomy.divides and asked.hidden and heads is None and hidden % heads_before:
        heads = fitting(source, hidden, asked.kv_heads)
    kv, group, split = head_layout(source, heads, asked.kv_heads)
    sizes = {
        **old,
        "hidden": hidden,
        "ffn": asked.ffn or old["ffn"],
        "kv": kv,
        "group": group,
        "dim": dim or old["dim"],
    }
    anatomy.config_keys(sizes)
    return sizes, split


def coupled(source: Checkpoint) -> bool:
    """Whether the class wants hidden = heads * head_dim."""
    table = source.anatomy.host(source.config).sizes
    keys = [key for key, _ in table]
    return any(keys.count(key) > 1 and text == "hidden" for key, text in table)


def fitting(source: Checkpoint, hidden: int, kv: int | None) -> int | None:
    """Heads, at most twice as many, that a class which wants whole heads per hidden size takes; None without any.

    As many as keep hidden = heads x head_dim come first, then the fewest.
    """
    before = source.sizes["kv"] * source.sizes["group"]
    counts = sorted(range(before, 2 * before + 1), key=lambda count: (count * source.sizes["dim"] != hidden, count))
    for count in counts:
        if hidden % count == 0:
            try:
                head_layout(source, count, kv)
            except RegraftError:
                continue
            return count
    return None


def couple(source: Checkpoint, asked: Asked) -> tuple[int, int, int]:
    """(hidden, heads, head_dim) with hidden = heads * head_dim; one left open follows from the others."""
    old, family = source.sizes, source.anatomy.family
    heads, dim = old["kv"] * old["group"], old["dim"]
    if asked.hidden is None:
        heads, dim = asked.heads or heads, asked.head_dim or dim
        if heads * dim != old["hidden"]:
            raise RegraftError(
                f"{family} wants hidden = heads x head_dim, so {heads} heads of {dim} cannot come alone: add --hidden "
                f"{heads * dim}{source.anatomy.bridge_hint(source.config)}"
            )
        return old["hidden"], heads, dim
    hidden = asked.hidden
    options = [(asked.heads, asked.head_dim), (asked.heads, None), (None, asked.head_dim), (None, dim), (heads, None)]
    if asked.heads or asked.head_dim:
        options = options[:1] if asked.heads and asked.head_dim else options[1:2] if asked.heads else options[2:3]
    else:
        options = options[3:]
    for some_heads, some_dim in options:
        divisor = some_heads or some_dim or 1
        if some_heads and some_dim:
            if some_heads * some_dim == hidden:
                return hidden, some_heads, some_dim
        elif hidden % divisor == 0:
            found = (some_heads or hidden // divisor, some_dim or hidden // divisor)
            if found[0] >= heads and found[1] >= dim:
                return hidden, *found
    step = asked.head_dim or dim
    near = sorted({max(old["hidden"], hidden // step * step), -(-hidden // step) * step})
    raise RegraftError(
        f"{family} wants hidden = heads x head_dim, which {hidden} is not for {asked.heads or 'any number of'} heads "
        f"of {step}: use --hidden {' or '.join(map(str, near))}{source.anatomy.bridge_hint(source.config)}"
    )


def head_layout(source: Checkpoint, heads: int | None, kv: int | None) -> tuple[int, int, int]:
    """(key/value heads, queries each, split) for the asked numbers; more queries, whole groups, or split kv heads."""
    old_kv, old_group = source.sizes["kv"], source.sizes["group"]
    if "group" in source.anatomy.host(source.config).fixed:
        if kv is not None and kv != (heads or old_kv):
            raise RegraftError(
                f"{source.anatomy.family} has a key/value head per query head: leave out --kv-heads {kv}"
            )
        return heads or old_kv, 1, 1
    wanted = heads or old_kv * old_group
    if kv is None:
        whole = wanted // old_group if wanted % old_group == 0 else old_kv
        kv = old_kv if heads is None else whole
    if wanted % kv:
        near = sorted({max(old_kv * old_group, wanted // kv * kv), -(-wanted // kv) * kv})
        fewer = max(number for number in range(1, kv + 1) if wanted % number == 0)
        raise RegraftError(
            f"{wanted} query heads cannot share {kv} key/value heads evenly: use --heads "
            f"{' or '.join(map(str, near))}, or --kv-heads {fewer}"
        )
    group = wanted // kv
    splits = [m for m in range(1, old_group + 1) if old_group % m == 0 and old_group // m <= group and old_kv * m <= kv]
    if not splits:
        every = old_kv * old_group
        raise RegraftError(
            f"{old_kv} key/value heads of {old_group} queries do not become {kv} of {group}: whole groups, more "
            f"queries a group and split heads reach --kv-heads {old_kv} --heads {-(-wanted // old_kv) * old_kv} or "
            f"--kv-heads {every} --heads {-(-wanted // every) * every}"
        )
    return kv, group, splits[0]


def unit_axes(
    old: Mapping[str, int], sizes: Mapping[str, int], split: int, ways: Mapping[str, str], seed: int
) -> dict[str, Expansion]:
    """Expansions of the axes whose coordinates are units of their own: neurons, heads, value coordinates."""
    inner = ways["head_dim"] if ways["head_dim"] in ("zero_in", "pair") else "pad"
    queries = "pad" if ways["heads"] == "zero_in" else ways["heads"]  # values have no axis of queries to silence
    return {
        "ffn": units(ways["ffn"], old["ffn"], sizes["ffn"], seed),
        "kv": units(ways["heads"], old["kv"] * split, sizes["kv"], seed),
        "group": units(queries, old["group"] // split, sizes["group"], seed),
        "dim": units(inner, old["dim"], sizes["dim"], seed),
    }


def units(how: str, old: int, new: int, seed: int) -> Expansion:
    """The expansion of an axis of units by an operator's name."""
    if new == old:
        return axes.identity(old)
    if how in ("pad", "zero_in", "pair"):
        return axes.pad(old, new, "reads" if how == "zero_in" else "writes", pairs=how == "pair")
    if how == "tile":
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
    exact = how in ("tile", "duplicate") or post
    if exact and new % old:
        near = sorted({max(1, new // old) * old, -(-new // old) * old})
        why = "its norms come after each sum" if post else f"--how {how} copies the stream evenly or not at all"
        raise RegraftError(
            f"{made.anatomy.family} cannot have hidden {new} exactly, {why}: use --hidden {' or '.join(map(str, near))}"
            + ("" if post else ", or --how hidden=pad or hidden=lemon for any width")
        )
    if how == "duplicate":
        return axes.duplicate(old, new, seed)
    if exact:
        return axes.tile(old, new)
    return axes.rounds(old, new) if how == "lemon" else axes.pad(old, new, "reads")


def folding(made: Widening, fold: str) -> Literal["stream", "eps"]:
    """How the mean square of a padded stream is kept; RegraftError when `eps` is asked for and cannot be."""
    others = [p.axes.text for p in made.parts if p.norm and p.axes.kind == "gain" and "hidden" not in p.axes.outputs[0]]
    if fold == "eps" and others:
        raise RegraftError(
            f"{made.anatomy.family} has one epsilon for norms over hidden and for '{others[0]}', which grow apart: "
            "use --fold stream"
        )
    return "stream" if others or fold == "stream" else "eps"


def query_norm(made: Widening, table: Mapping[str, Expansion]) -> str | None:
    """How normed queries and keys take wider heads: LIVE for multiples, DEAD (new coordinates stay zero) otherwise."""
    if not any(p.norm and "dim" in p.axes.outputs[0] for p in made.parts):
        return None
    for axis in ("kv", "group") if made.full_norm else ():
        if table[axis].new % table[axis].old or table[axis].copies != 1:
            times = -(-table[axis].new // table[axis].old)
            raise RegraftError(
                f"{made.anatomy.family} norms all heads together, so heads come in whole multiples by --how heads=pad, "
                f"not {table[axis].old} to {table[axis].new}: use {times} times as many"
            )
    return DEAD if table["qk"].new % table["qk"].old else LIVE


def check_activation(source: Checkpoint, ways: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """RegraftError when silent inputs would stay silent for ever."""
    if ways["ffn"] == "zero_in" and sizes["ffn"] != source.sizes["ffn"]:
        anatomy = source.anatomy.host(source.config)
        gated = any(role.split(".")[-2] == "gate" for role, _ in source.tensors)
        name = str(source.anatomy.filled(source.config).get(anatomy.activation, ""))
        if name.startswith("relu") and not gated:
            raise RegraftError(
                f"units whose inputs are zero never wake up under {name}: use --how ffn=pad, pair or split"
            )
