"""How many tokens two models must read before everything in them that depends on length has acted:
windows, chunks of attention, rotary scaling, tables of positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from .. import modeling
from ..core.checkpoint import Checkpoint

LENGTH = 96  # tokens of models without any such length
MARGIN = 32  # tokens beyond one
SECOND_WINDOW = 256  # tokens beyond the first window, or as many as the window has
# Multiply-adds count twice. About a minute on two cores, for one pass of source and result each.
BUDGET_FLOPS = 2e12
# Types of rotary scaling whose frequencies depend on the number of tokens -> the key with the
# number from which on they do.
SCALING_BY_LENGTH = {
    "dynamic": "max_position_embeddings",
    "longrope": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Reach:
    """The lengths of what two models are compared on.

    Attributes:
        length: tokens of a row.
        cached: tokens of the row that is decoded through the cache.
        rolls: lengths at which a cache begins to drop its first tokens.
        positions: most tokens that the models take; None: there is no limit.
        limited: what lies beyond these lengths and why; None: nothing does.
    """

    length: int
    cached: int
    rolls: tuple[int, ...]
    positions: int | None
    limited: str | None


def find_reach(before: Checkpoint, after: Checkpoint, model: PreTrainedModel) -> Reach:
    """How far a source and its result have to be compared, and how far they can be.

    Args:
        before: the source.
        after: the result.
        model: of the source.
    """
    if before.anatomy.inputs in modeling.PAIRED:
        # Tables of positions may have two rows in front that are never read.
        positions = before.sizes.get("pos")
        return Reach(min(LENGTH, positions - 2 if positions else LENGTH), 0, (), positions, None)
    if before.anatomy.inputs == "texts and images":
        return Reach(min(LENGTH, before.sizes["pos"]), 0, (), before.sizes["pos"], None)
    if before.anatomy.host(before.config).inputs != "tokens":
        return Reach(0, 0, (), None, None)
    host = modeling.build_stock_config(after.anatomy.host_config(after.config))
    configs = [config.get_text_config() for config in (model.config, host)]
    windows = {size for config in configs for size in iter_windows(config)}
    windows |= {size for one in (before, after) for size in iter_mixer_windows(one.config)}
    scaled = {size for config in configs for size in iter_scaled_lengths(config)}

    # Up to twice a window: what a layer drops has then reached the next through what it kept.
    reasons = {
        size + min(size, SECOND_WINDOW) + MARGIN: f"a window of {size:,} tokens"
        for size in sorted(windows)
    }
    reasons |= {size + MARGIN: f"rotary scaling beyond {size:,} tokens" for size in sorted(scaled)}
    positions = count_positions(before, after, model)
    if positions is not None:
        reasons[positions] = f"a table of {positions:,} positions"
    needed = max([LENGTH, *reasons])
    if positions is not None:
        needed = min(needed, positions)

    length = min(needed, max(LENGTH, affordable_length(before, after)))
    limits = []
    if length < needed:
        what = "; ".join(why for size, why in sorted(reasons.items()) if size > length)
        limits.append(
            f"{length:,} of {needed:,} tokens: more than {BUDGET_FLOPS:.0e} FLOPs ({what})"
        )
    # Keys in a cache keep the rotary frequencies that they were written with.
    cached = min([length, *(size - 1 for size in scaled)])
    if cached < length and before.anatomy.continues_text(before.config):
        limits.append(f"the cache for {cached:,} tokens: rotary scaling turns later keys otherwise")
    return Reach(length, cached, tuple(sorted(windows)), positions, "; ".join(limits) or None)


def affordable_length(before: Checkpoint, after: Checkpoint) -> int:
    """Tokens of which one pass of both models takes BUDGET_FLOPS.

    Args:
        before: the source.
        after: the result.
    """
    parameters = sum(lazy.size for one in (before, after) for lazy in one.tensors.values())
    heads = [(one.sizes, one.sizes["kv"] * one.sizes["group"]) for one in (before, after)]
    scores = sum(sizes["depth"] * count * 4 * sizes["dim"] for sizes, count in heads)
    # The positive root of scores * n ** 2 + 2 * parameters * n = BUDGET_FLOPS.
    root = (parameters**2 + scores * BUDGET_FLOPS) ** 0.5
    return int((root - parameters) / scores)


def iter_windows(config: PreTrainedConfig) -> Iterator[int]:
    """Sizes of sliding windows and chunks of attention in a stock config's layers."""
    _, layers = get_layer_types_and_kwargs(config)
    for layer in layers:
        if isinstance(layer.get("sliding_window"), int):
            yield layer["sliding_window"]


def iter_mixer_windows(config: Mapping[str, Any]) -> Iterator[int]:
    """Tokens that the windows in a linearized model's mixers keep, sinks included."""
    waiting: list[Any] = list(config.get("mixers") or ())
    while waiting:
        spec = waiting.pop()
        if isinstance(spec, dict):
            waiting += spec.values()
            if type(spec.get("window")) is int:
                yield spec["window"] + int(spec.get("sinks") or 0)


def iter_scaled_lengths(config: PreTrainedConfig) -> Iterator[int]:
    """Lengths from which on a stock config's rotary frequencies change."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in nested or [rope]:
        key = SCALING_BY_LENGTH.get(str(parameters.get("rope_type")), "")
        size = parameters.get(key) or getattr(config, key, None) if key else None
        if isinstance(size, int):
            yield size


def count_positions(before: Checkpoint, after: Checkpoint, model: nn.Module) -> int | None:
    """Tokens that the tables of learned positions of both have room for; None without a table."""
    sizes = [one.sizes["pos"] for one in (before, after) if "pos" in one.sizes]
    placed = before.anatomy.place(before.config).get(("pos.weight", None))
    if not sizes or placed is None:
        return min(sizes, default=None)
    # A table with a row for padding counts from behind that row.
    padding = getattr(model.get_submodule(placed.name.rpartition(".")[0]), "padding_idx", None)
    return min(sizes) - (0 if padding is None else padding + 1)
