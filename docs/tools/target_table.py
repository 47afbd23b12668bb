"""What each target of `regraft export` holds: its own rules are asked about tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from family_table import list_stock_families, tiny_source

from regraft.errors import RegraftError
from regraft.export import find_target, list_targets
from regraft.export.targets.qwen3_5 import OPTIONS
from regraft.mixers.registry import mixers
from regraft.mixers.remix import Remix

# Where a mixer needs other options than its own defaults to be shown.
SHOWN: dict[str, Remix] = {
    "gated_deltanet, `--for qwen3_5`": Remix("gated_deltanet", "0", window=0, options=OPTIONS),
    "gated": Remix(keep="none"),
    "window": Remix("window", "none"),
    "window, `--sinks 0`": Remix("window", "none", sinks=0),
    "rwkv6, `--for rwkv6qwen2`": Remix(**find_target("rwkv6qwen2").remix),
    "mamba2, `--for granite_hybrid`": Remix(**find_target("granite_hybrid").remix, keep="0"),
}


def students() -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is, config) of a Llama with each mixer, and of a stock model of each family."""
    # Heads are as wide together as the stream, as some engines require.
    llama = tiny_source("llama", hidden=32)
    shown = {name: Remix(name, "none", window=0) for name in mixers() if name not in SHOWN}
    shown["sink_window"] = Remix("sink_window", "none")
    for name, remix in sorted((SHOWN | shown).items()):
        yield f"mixer {name}", remix.build_config(llama)
    for family in list_stock_families():
        source = tiny_source(family)
        # A class of transformers has the activation where the table's config says none.
        yield f"{family}", dict(source.config)


@cache
def answers() -> dict[tuple[str, str], tuple[str, ...]]:
    """(model, target) -> what does not fit."""
    found = {}
    for name, config in students():
        for target in list_targets():
            try:
                found[name, target] = tuple(find_target(target).find_misfits(config))
            except RegraftError as error:
                found[name, target] = (str(error),)
    return found


def target_rows() -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of targets."""
    names = list(dict.fromkeys(name for name, _ in answers()))
    rows = [
        [name, *("no" if answers()[name, target] else "yes" for target in list_targets())]
        for name in names
    ]
    return ["model", *(f"`{target}`" for target in list_targets())], rows


def target_refusals() -> list[str]:
    """The first reason of every refusal, each once, and one for all mixers."""
    lines = {}
    for (_, target), found in answers().items():
        if found:
            what = (
                found[0].partition(" has the mixer ")[0]
                if "has the mixer" in found[0]
                else found[0]
            )
            lines.setdefault((target, what), f"`{target}`: {found[0]}")
    return list(lines.values())


if __name__ == "__main__":
    for row in target_rows()[1]:
        print(" | ".join(row))
    print("\n".join(target_refusals()))
