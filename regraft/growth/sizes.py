"""Asked sizes to all sizes: what follows from what, and what a class or its heads cannot hold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError


@dataclass(frozen=True)
class WidthSizes:
    """Sizes as a user gives them, None for those left open."""

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True)
class TargetSizes(WidthSizes):
    """Sizes of a whole target; those left open stay as in the source, or follow."""

    layers: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """All of them by name, whatever else the step holds."""
        return {field.name: getattr(self, field.name) for field in fields(TargetSizes)}


def solve_sizes(source: Checkpoint, asked: WidthSizes) -> tuple[dict[str, int], int]:
    """(axis sizes of the target, parts each key/value head is split into)."""
    old, anatomy = source.sizes, source.anatomy.host(source.config)
    heads_before = old["kv"] * old["group"]
    before = {
        "hidden": old["hidden"],
        "ffn": old["ffn"],
        "heads": heads_before,
        "kv_heads": old["kv"],
    }
    for name, size in {**before, "head_dim": old["dim"]}.items():
        wanted = getattr(asked, name)
        if wanted is not None and wanted < size:
            raise RegraftError(
                f"--{name.replace('_', '-')} {wanted} is smaller than the source's {size}: growth"
                f" never shrinks, give {size} or more"
            )

    # Classes without head_dim couple three sizes; classes that want hidden % heads == 0 get more
    # heads where the user left them open; else every size is free.
    hidden, heads, dim = asked.hidden or old["hidden"], asked.heads, asked.head_dim
    if has_coupled_heads(source):
        hidden, heads, dim = solve_coupled_sizes(source, asked)
    elif anatomy.divides and asked.hidden and heads is None and hidden % heads_before:
        heads = find_head_count(source, hidden, asked.kv_heads)
    kv, group, split = head_layout(source, heads, asked.kv_heads)
    sizes = {
        **old,
        "hidden": hidden,
        "ffn": asked.ffn or old["ffn"],
        "kv": kv,
        "group": group,
        "dim": dim or old["dim"],
    }

    # Raises for sizes that no config of the class can say.
    anatomy.config_keys(sizes)
    return sizes, split


def has_coupled_heads(source: Checkpoint) -> bool:
    """Whether the class wants hidden = heads * head_dim."""
    table = source.anatomy.host(source.config).sizes
    keys = [key for key, _ in table]
    return any(keys.count(key) > 1 and text == "hidden" for key, text in table)


def find_head_count(source: Checkpoint, hidden: int, kv: int | None) -> int | None:
    """Heads, at most twice as many, that a class which wants whole heads per hidden size takes;
    None without any.

    As many as keep hidden = heads x head_dim come first, then the fewest.
    """
    before = source.sizes["kv"] * source.sizes["group"]
    counts = sorted(
        range(before, 2 * before + 1),
        key=lambda count: (count * source.sizes["dim"] != hidden, count),
    )
    for count in counts:
        if hidden % count == 0:
            try:
                head_layout(source, count, kv)
            except RegraftError:
                continue
            return count
    return None


def solve_coupled_sizes(source: Checkpoint, asked: WidthSizes) -> tuple[int, int, int]:
    """(hidden, heads, head_dim) with hidden = heads * head_dim; one left open follows from the
    others.
    """
    old, family = source.sizes, source.anatomy.family
    heads, dim = old["kv"] * old["group"], old["dim"]
    if asked.hidden is None:
        heads, dim = asked.heads or heads, asked.head_dim or dim
        if heads * dim != old["hidden"]:
            raise RegraftError(
                f"{family} wants hidden = heads x head_dim, so {heads} heads of {dim} cannot come"
                f" alone: add --hidden {heads * dim}{source.anatomy.bridge_hint(source.config)}"
            )
        return old["hidden"], heads, dim
    hidden = asked.hidden
    options = [
        (asked.heads, asked.head_dim),
        (asked.heads, None),
        (None, asked.head_dim),
        (None, dim),
        (heads, None),
    ]
    if asked.heads or asked.head_dim:
        options = (
            options[:1]
            if asked.heads and asked.head_dim
            else options[1:2]
            if asked.heads
            else options[2:3]
        )
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
    least = (asked.heads or heads) * (asked.head_dim or dim)
    step = least if asked.heads and asked.head_dim else asked.heads or asked.head_dim or dim
    near = sorted({max(least, hidden // step * step), max(least, -(-hidden // step) * step)})
    near = [least] if step == least else near
    size = asked.head_dim or (f"{dim} or more" if asked.heads else dim)
    raise RegraftError(
        f"{family} wants hidden = heads x head_dim, which {hidden} is not for"
        f" {asked.heads or 'any number of'} heads of {size}: use --hidden"
        f" {' or '.join(map(str, near))}{source.anatomy.bridge_hint(source.config)}"
    )


def head_layout(source: Checkpoint, heads: int | None, kv: int | None) -> tuple[int, int, int]:
    """(key/value heads, queries each, split) for the asked numbers; more queries, whole groups, or
    split kv heads.
    """
    old_kv, old_group = source.sizes["kv"], source.sizes["group"]
    if "group" in source.anatomy.host(source.config).fixed:
        if kv is not None and kv != (heads or old_kv):
            raise RegraftError(
                f"{source.anatomy.family} has a key/value head per query head: leave out --kv-heads"
                f" {kv}"
            )
        return heads or old_kv, 1, 1

    # How many key/value heads: as many groups as the queries fill, where that comes out even.
    wanted = heads or old_kv * old_group
    if kv is None:
        whole = wanted // old_group if wanted % old_group == 0 else old_kv
        kv = old_kv if heads is None else whole
    if wanted % kv:
        every = old_kv * old_group
        near = [
            n
            for n in (wanted // kv * kv, -(-wanted // kv) * kv)
            if n >= every and possible_splits(source, n, kv)
        ]
        raise RegraftError(
            f"{wanted} query heads cannot share {kv} key/value heads evenly: use --heads "
            f"{' or '.join(map(str, near)) or f'{every} --kv-heads {old_kv}'}"
        )

    # Old heads must stand at whole places of the new layout (docs/concepts/expansions.md, L8).
    group, parts = wanted // kv, possible_splits(source, wanted, kv)
    if not parts:
        every = old_kv * old_group
        raise RegraftError(
            f"{old_kv} key/value heads of {old_group} queries do not become {kv} of {group}: whole"
            f" groups, more queries a group and split heads reach --kv-heads {old_kv} --heads"
            f" {-(-wanted // old_kv) * old_kv} or --kv-heads {every} --heads"
            f" {-(-wanted // every) * every}"
        )
    return kv, group, parts[0]


def possible_splits(source: Checkpoint, heads: int, kv: int) -> list[int]:
    """Numbers of parts into which key/value heads can be split to get `kv` of them, shared evenly
    by `heads`.
    """
    old_kv, old_group, group = source.sizes["kv"], source.sizes["group"], heads // kv
    return [
        m
        for m in range(1, old_group + 1)
        if old_group % m == 0 and old_group // m <= group and old_kv * m <= kv
    ]
