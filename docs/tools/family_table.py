"""What each family can do: every size and every change is asked for on a tiny model of the family.

Nothing is written down here but the sizes to try. A refusal is the message of the step that
refuses.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

from tracing import Source

from regraft.core.anatomy import (
    Anatomy,
    find_anatomy,
    list_families,
    list_served_families,
    module_name,
)
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.steps.widen import Widen
from regraft.mixers.remix import Remix

# A model of 2 layers; `hidden` is 48 where the family leaves it free of the heads, 2 heads of 8
# where it does not.
AXES = {
    "vocab": 11, "hidden": 48, "pool": 48, "ffn": 96, "kv": 2, "group": 2, "dim": 8, "depth": 2, "encoder_depth": 2, "mel": 4, "embed": 20, "task": 3, "pos": 7, "place": 9, "type": 2,
    "inner": 48, "tap": 3, "expert": 8, "dense_ffn": 96, "shared_ffn": 96, "routed_ffn": 48, "label": 3, "channel": 3, "decoder_hidden": 32, "decoder_ffn": 48, "decoder_depth": 1, "register": 4, "bucket": 5, "patch": 2, "kernel": 4,
}  # fmt: skip
FLAGS = {
    "ffn": "--ffn",
    "heads": "--heads",
    "kv_heads": "--kv-heads",
    "head_dim": "--head-dim",
    "hidden": "--hidden",
}
SHOWN = {"kv": "heads", "group": "heads", "dim": "head_dim"}


def list_stock_families() -> list[str]:
    """Families of stock classes that are grown."""
    left_out = {"regraft", *list_served_families()}
    found = [name for name in list_families() if name not in left_out]
    # Models of two towers, whose tables are those of the towers.
    return [name for name in found if find_anatomy_of(name).inputs != "texts and images"]


def find_anatomy_of(family: str) -> Anatomy:
    """The table of a family, which no config is needed for."""
    anatomy: Anatomy = importlib.import_module(f"regraft.families.{module_name(family)}").anatomy
    return anatomy


@cache
def tiny_source(family: str, **other: int) -> Checkpoint:
    """A tiny model of a family, in memory, some axes of which may have other sizes."""
    anatomy = find_anatomy({"model_type": family})
    sizes = AXES | other | dict(anatomy.fixed)
    refused: Exception = RegraftError(f"no sizes for {family}")
    for hidden in (sizes["hidden"], sizes["kv"] * sizes["group"] * sizes["dim"]):
        try:
            keys = anatomy.config_keys(sizes | {"hidden": hidden, "pool": hidden})
            keys |= anatomy.finish(anatomy.fill_defaults(keys))
            config = {key: value for key, value in keys.items() if not key.startswith("_")}
            return Source({"model_type": family, **config}).checkpoint
        except RegraftError as error:
            refused = error
    raise refused


def sizes_to_try(source: Checkpoint, name: str) -> list[int]:
    """Larger sizes, up to twice the old one: what is taken in steps is taken in those that divide it."""
    sizes = source.sizes
    heads = sizes["kv"] * sizes.get("group", 1)
    if name == "kv_heads":
        return [size for size in range(sizes["kv"] + 1, heads + 1) if heads % size == 0]
    old = {"heads": heads, "head_dim": sizes["dim"]}.get(name) or sizes[name]
    return [old + step for step in range(1, old + 1) if old % step == 0]


@cache
def ask_sizes(family: str, name: str) -> tuple[dict[int, set[str]], str]:
    """(size taken -> other axes that moved, the first refusal)."""
    source = tiny_source(family)
    own = {"ffn": {"ffn"}, "heads": {"kv", "group"}, "kv_heads": {"kv", "group"}}
    mine = own.get(name, {"dim"} if name == "head_dim" else {"hidden", "pool"})
    taken: dict[int, set[str]] = {}
    refusal = ""
    for size in sizes_to_try(source, name):
        asked: dict[str, Any] = {name: size}
        try:
            grown = Widen(**asked)(source)
        except RegraftError as error:
            refusal = refusal or str(error)
            continue
        moved = {axis for axis, value in grown.sizes.items() if value != source.sizes[axis]}
        taken[size] = {SHOWN.get(axis, axis) for axis in moved - mine}
    return taken, refusal


def describe_sizes(source: Checkpoint, name: str) -> str:
    """Which sizes a family takes, in words."""
    tried = sizes_to_try(source, name)
    taken, refusal = ask_sizes(source.anatomy.family, name)
    if not taken:
        return "with hidden" if "--hidden" in refusal else "no"
    follow = sorted(set().union(*taken.values()))
    tail = f"; {' and '.join(follow)} may follow" if follow else ""
    if len(taken) == len(tried):
        return "any" + tail

    sizes = source.sizes
    heads = sizes["kv"] * sizes["group"]
    old = {"heads": heads, "kv_heads": sizes["kv"], "head_dim": sizes["dim"]}.get(name) or sizes[
        name
    ]
    step = math.gcd(old, *taken)
    if sorted(taken) != [size for size in tried if size % step == 0]:
        return "where the heads divide hidden" + tail if source.anatomy.divides else "some" + tail
    if step == old:
        return "whole multiples" + tail
    if name == "heads":
        return "whole groups" + tail
    named = {"hidden": {heads: "the heads"}, "ffn": {sizes["hidden"]: "hidden"}}
    return f"multiples of {named.get(name, {}).get(step, step)}" + tail


def list_objectives(family: str) -> str:
    """Stages that train a stock model of the family."""
    anatomy = find_anatomy({"model_type": family})
    if anatomy.inputs != "tokens":
        return "`image`" if anatomy.inputs == "pixels" else "no"
    return "`next`, `distil`" if anatomy.causal else "`mask`"


def can_linearize(family: str) -> str:
    """Whether Remix takes the family, or what it says."""
    try:
        Remix(keep="none")(tiny_source(family))
    except RegraftError:
        return "no"
    return "yes"


def find_bridge(family: str) -> str:
    """The family that its checkpoints can be written as, if any."""
    source = tiny_source(family)
    return source.anatomy.bridge(source.anatomy.fill_defaults(source.config)) or ""


def family_rows() -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of families."""
    head = [
        "family",
        *(f"`{flag}`" for flag in FLAGS.values()),
        "linearize",
        "trains",
        "as another class",
    ]
    rows = []
    for family in list_stock_families():
        source = tiny_source(family)
        rows.append(
            [
                family,
                *(describe_sizes(source, name) for name in FLAGS),
                can_linearize(family),
                list_objectives(family),
                find_bridge(family),
            ]
        )
    return head, rows


def refusals() -> list[str]:
    """The first refusal of every family and size, each message once."""
    found: dict[str, None] = {}
    for family in list_stock_families():
        source = tiny_source(family)
        for name in FLAGS:
            if message := ask_sizes(family, name)[1]:
                found[message] = None
        try:
            Remix(keep="none")(source)
        except RegraftError as error:
            found[str(error)] = None
    return list(found)


if __name__ == "__main__":
    for row in family_rows()[1]:
        print(" | ".join(row))
    print("\n".join(refusals()))
