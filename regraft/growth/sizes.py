"""From the sizes in a request to all sizes: what follows, and what a class cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from ..core.anatomy import Anatomy
from ..core.checkpoint import Checkpoint
from ..core.config_checks import check_sizes
from ..errors import RegraftError
from .target_sizes import WidthSizes


def solve_sizes(source: Checkpoint, request: WidthSizes) -> tuple[dict[str, int], int]:
    """All axis sizes of the target that a request asks for.

    RegraftError when a size shrinks or the class cannot hold the sizes; the message names the
    nearest that work.

    Args:
        source: the checkpoint to grow.
        request: the sizes; those left open follow from the others or stay.

    Returns:
        The sizes of the target by axis name, and into how many heads each key/value head of the
        source is split (1: they stay whole).
    """
    asked = {field.name: getattr(request, field.name) for field in fields(WidthSizes)}
    check_sizes(source.anatomy.family, {name: size for name, size in asked.items() if size})
    _check_no_size_shrinks(source, request)
    old, anatomy = source.sizes, source.anatomy.host(source.config)
    old_heads = old["kv"] * old["group"]

    # Classes without head_dim couple three sizes; classes that want hidden % heads == 0 get more
    # heads where the request leaves them open; else every size is free.
    hidden, heads, dim = request.hidden or old["hidden"], request.heads, request.head_dim
    if has_coupled_heads(source):
        hidden, heads, dim = solve_coupled_sizes(source, request)
    elif anatomy.divides and request.hidden and heads is None and hidden % old_heads:
        heads = find_head_count(source, hidden, request.kv_heads)
    kv, group, split = head_layout(source, heads, request.kv_heads)

    sizes = {
        **old,
        "hidden": hidden,
        "ffn": request.ffn or anatomy.ffn_ratio * hidden or old["ffn"],
        "kv": kv,
        "group": group,
        "dim": dim or old["dim"],
    }
    if anatomy.inner_ratio:
        sizes["inner"] = anatomy.inner_ratio * hidden
    # Raises for sizes that no config of the class can say.
    anatomy.config_keys(sizes)
    _check_fixed_sizes(anatomy, old_heads, sizes)
    return sizes, split


def _check_fixed_sizes(anatomy: Anatomy, old_heads: int, sizes: Mapping[str, int]) -> None:
    """RegraftError where the number of heads or the MLP's width is not free."""
    heads, ffn = sizes["kv"] * sizes["group"], anatomy.ffn_ratio * sizes["hidden"]
    if anatomy.alibi and heads != old_heads:
        raise RegraftError(
            f"{anatomy.family} has ALiBi, with other slopes for {heads} heads than for {old_heads}:"
            f" use --heads {old_heads}"
        )
    if ffn and sizes["ffn"] != ffn:
        raise RegraftError(
            f"{anatomy.family} has an MLP of {anatomy.ffn_ratio} times hidden, which"
            f" {sizes['ffn']} is not for {sizes['hidden']}: use --ffn {ffn}"
        )


def _check_no_size_shrinks(source: Checkpoint, request: WidthSizes) -> None:
    old = source.sizes
    old_sizes = {
        "hidden": old["hidden"],
        "ffn": old["ffn"],
        "heads": old["kv"] * old["group"],
        "kv_heads": old["kv"],
        "head_dim": old["dim"],
    }
    for name, old_size in old_sizes.items():
        new_size = getattr(request, name)
        if new_size is not None and new_size < old_size:
            raise RegraftError(
                f"--{name.replace('_', '-')} {new_size} is smaller than the source's {old_size}:"
                f" growth never shrinks, give {old_size} or more"
            )


def has_coupled_heads(source: Checkpoint) -> bool:
    """Whether the class has no head_dim of its own, so that hidden = heads * head_dim."""
    # Such a family lists one config key twice: once for hidden, once for the product of the axes.
    table = source.anatomy.host(source.config).sizes
    keys = [key for key, _ in table]
    return any(keys.count(key) > 1 and axes == "hidden" for key, axes in table)


def find_head_count(source: Checkpoint, hidden: int, kv: int | None) -> int | None:
    """A number of heads that divides `hidden`, for classes that need one; None if there is none.

    Up to twice the source's heads are tried: first the number with hidden = heads * head_dim, then
    the others from the fewest.
    """
    old_heads = source.sizes["kv"] * source.sizes["group"]
    counts = sorted(
        range(old_heads, 2 * old_heads + 1),
        key=lambda count: (count * source.sizes["dim"] != hidden, count),
    )
    for count in counts:
        if hidden % count == 0 and _has_head_layout(source, count, kv):
            return count
    return None


def _has_head_layout(source: Checkpoint, heads: int, kv: int | None) -> bool:
    try:
        head_layout(source, heads, kv)
    except RegraftError:
        return False
    return True


def solve_coupled_sizes(source: Checkpoint, request: WidthSizes) -> tuple[int, int, int]:
    """(hidden, heads, head_dim) with hidden = heads * head_dim; what is open follows.

    RegraftError when the sizes of the request do not fit each other, or the one that follows from
    them would be smaller than the source's.
    """
    if request.hidden is None:
        return _keep_coupled_hidden(source, request)

    hidden = request.hidden
    old_heads, old_dim = source.sizes["kv"] * source.sizes["group"], source.sizes["dim"]
    for heads, dim in _coupled_candidates(source, hidden, request):
        if heads * dim == hidden and heads >= old_heads and dim >= old_dim:
            return hidden, heads, dim
    raise RegraftError(_explain_coupled_sizes(source, hidden, request))


def _keep_coupled_hidden(source: Checkpoint, request: WidthSizes) -> tuple[int, int, int]:
    """The sizes of a request that leaves hidden as it is; the other two cannot grow alone."""
    old = source.sizes
    heads, dim = request.heads or old["kv"] * old["group"], request.head_dim or old["dim"]
    if heads * dim != old["hidden"]:
        raise RegraftError(
            f"{source.anatomy.family} wants hidden = heads x head_dim, so {heads} heads of {dim}"
            f" cannot come alone: add --hidden {heads * dim}"
            f"{source.anatomy.bridge_hint(source.config)}"
        )
    return old["hidden"], heads, dim


def _coupled_candidates(
    source: Checkpoint, hidden: int, request: WidthSizes
) -> Sequence[tuple[int, int]]:
    """(heads, head_dim) to try, the best first; an open size is hidden over the other one."""
    heads, dim = request.heads, request.head_dim
    if heads and dim:
        return [(heads, dim)]
    if heads:
        return [(heads, hidden // heads)]
    if dim:
        return [(hidden // dim, dim)]

    # More heads of the old width come first: they leave the softmax scale and rotary frequencies
    # alone. Only where they do not fill hidden do the old heads get wider.
    old_heads, old_dim = source.sizes["kv"] * source.sizes["group"], source.sizes["dim"]
    ways = [(hidden // old_dim, old_dim), (old_heads, hidden // old_heads)]
    return ways[::-1] if source.anatomy.host(source.config).alibi else ways


def _explain_coupled_sizes(source: Checkpoint, hidden: int, request: WidthSizes) -> str:
    """Why hidden = heads * head_dim cannot hold, and the nearest hidden sizes for which it does."""
    old_heads, old_dim = source.sizes["kv"] * source.sizes["group"], source.sizes["dim"]
    heads, dim = request.heads, request.head_dim
    least = (heads or old_heads) * (dim or old_dim)
    step = least if heads and dim else heads or dim or old_dim

    below, above = hidden // step * step, -(-hidden // step) * step
    near = [least] if step == least else sorted({max(least, below), max(least, above)})
    head_size = dim or (f"{old_dim} or more" if heads else old_dim)
    return (
        f"{source.anatomy.family} wants hidden = heads x head_dim, which {hidden} is not for"
        f" {heads or 'any number of'} heads of {head_size}: use --hidden"
        f" {' or '.join(map(str, near))}{source.anatomy.bridge_hint(source.config)}"
    )


def head_layout(source: Checkpoint, heads: int | None, kv: int | None) -> tuple[int, int, int]:
    """(key/value heads, queries each, split) of the target: whole new groups, more queries in every
    group, or key/value heads that are split.

    `heads` None keeps the number of query heads, `kv` None takes as many key/value heads as they
    need. RegraftError when the old heads cannot keep their places in such a layout.
    """
    old_kv, old_group = source.sizes["kv"], source.sizes["group"]
    if "group" in source.anatomy.host(source.config).fixed:
        return _ungrouped_layout(source, heads, kv)

    # Open key/value heads: whole groups of the old size where the queries fill them, else the old
    # number.
    new_heads = heads or old_kv * old_group
    if kv is None:
        fills_groups = heads is not None and new_heads % old_group == 0
        kv = new_heads // old_group if fills_groups else old_kv
    if new_heads % kv:
        raise RegraftError(_explain_uneven_groups(source, new_heads, kv))

    # Query head i reads key/value head i // group, before and after (docs/concepts/expansions.md,
    # L8): old queries must find their old keys there.
    group, splits = new_heads // kv, possible_splits(source, new_heads, kv)
    if not splits:
        raise RegraftError(_explain_impossible_groups(source, new_heads, kv))
    return kv, group, splits[0]


def _ungrouped_layout(
    source: Checkpoint, heads: int | None, kv: int | None
) -> tuple[int, int, int]:
    """The layout of classes with one key/value head for every query head."""
    heads = heads or source.sizes["kv"]
    if kv is not None and kv != heads:
        raise RegraftError(
            f"{source.anatomy.family} has a key/value head per query head: leave out --kv-heads"
            f" {kv}"
        )
    return heads, 1, 1


def _explain_uneven_groups(source: Checkpoint, heads: int, kv: int) -> str:
    old_kv, old_heads = source.sizes["kv"], source.sizes["kv"] * source.sizes["group"]
    below, above = heads // kv * kv, -(-heads // kv) * kv
    near = [
        count
        for count in (below, above)
        if count >= old_heads and possible_splits(source, count, kv)
    ]
    return (
        f"{heads} query heads cannot share {kv} key/value heads evenly: use --heads"
        f" {' or '.join(map(str, near)) or f'{old_heads} --kv-heads {old_kv}'}"
    )


def _explain_impossible_groups(source: Checkpoint, heads: int, kv: int) -> str:
    old_kv, old_group = source.sizes["kv"], source.sizes["group"]
    old_heads = old_kv * old_group
    return (
        f"{old_kv} key/value heads of {old_group} queries do not become {kv} of {heads // kv}:"
        f" whole groups, more queries a group and split heads reach --kv-heads {old_kv} --heads"
        f" {-(-heads // old_kv) * old_kv} or --kv-heads {old_heads} --heads"
        f" {-(-heads // old_heads) * old_heads}"
    )


def possible_splits(source: Checkpoint, heads: int, kv: int) -> list[int]:
    """Numbers of parts into which key/value heads can be split to get `kv` of them, shared evenly
    by `heads`.

    A head split into m parts is repeated m times, each part for its share of the old queries.
    """
    old_kv, old_group, group = source.sizes["kv"], source.sizes["group"], heads // kv
    return [
        parts
        for parts in range(1, old_group + 1)
        if old_group % parts == 0 and old_group // parts <= group and old_kv * parts <= kv
    ]
