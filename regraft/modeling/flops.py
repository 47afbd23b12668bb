"""FLOPs of a forward pass and of a training step, from a config's anatomy alone: no weights, no model.

A multiply-add is 2 and only matrix products count, as in `torch.utils.flop_counter`: every map 2 * in * out per
position that it is applied to, attention over all pairs of positions, masked ones included. A training step is a
forward and a backward pass, which has a product for each of the two operands of every one before; what a kernel or
checkpointing computes a second time is not counted, so that a number belongs to the model and not to the machine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..core.anatomy import Config, find_anatomy
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.base import Attention
from ..mixers.registry import mixer_class

Shape = tuple[int, ...]


def forward_flops(model: Checkpoint | Config, length: int, batch: int = 1) -> int:
    """FLOPs of one forward pass over `batch` rows of `length` tokens (of images: whatever length, see `positions`).

    A linearized model's rows are one document each. RegraftError for a length that the model does not have.
    """
    return batch * row_flops(model, length)[0]


def training_flops(model: Checkpoint | Config, length: int, batch: int = 1) -> int:
    """FLOPs of one forward and backward pass with every weight trained; arguments and errors as in `forward`."""
    return batch * sum(row_flops(model, length))


def row_flops(model: Checkpoint | Config, length: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of one row."""
    config = _config(model)
    length = count_positions(config, length)
    costs = [weight_flops(config, length)]
    anatomy, sizes = find_anatomy(config), find_anatomy(config).solve(config)
    softmax = 4 * sizes["kv"] * sizes["group"] * sizes["dim"] * length**2
    for layer, spec in enumerate(config.get("mixers") or [None] * sizes["depth"]):
        if spec is None:
            costs.append((softmax, 2 * softmax))
        else:
            attention = Attention(**anatomy.attention(config, layer))
            costs.append(mixer_class(spec["name"]).row_flops(attention, spec, length))
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


def weight_flops(model: Checkpoint | Config, length: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of the products with weights on a row of `length` positions; a tied head is one too.

    Nothing is passed back into pixels.
    """
    config = _config(model)
    anatomy = find_anatomy(config)
    family, full, sizes = anatomy.host(config), anatomy.fill_defaults(config), anatomy.solve(config)
    routed = Fraction(length * full[family.routed], sizes["expert"]) if family.routed else 0
    places = {"each": length, "first": 1, "patch": length - 1, "routed": routed}
    once, back = Fraction(0), Fraction(0)
    for spot in anatomy.place(anatomy.untie_embeddings(config)).values():
        if spot.part.is_matrix:
            cost = 2 * math.prod(spot.shape) * places[spot.part.at]
            once, back = once + cost, back + cost * (1 if spot.part.at == "patch" else 2)
    return int(once), int(back)


def count_positions(model: Checkpoint | Config, length: int) -> int:
    """Positions of a row: `length` tokens; of an image its patches and the class token, at the config's size."""
    config = _config(model)
    anatomy = find_anatomy(config)
    held = anatomy.solve(config).get("pos")
    if held and anatomy.host(config).inputs == "pixels":
        return held
    if length < 1 or (held and length > held):
        raise RegraftError(
            f"rows of {length} tokens in a {anatomy.family}: give 1 to {held or 'any number'}"
        )
    return length


class NullModuleTracker:
    """In place of the library's record of modules, whose hooks keep what gradient checkpointing would free."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None:
        """Nothing is recorded."""

    def __exit__(self, *failure: Any) -> None:
        """Nothing is taken away."""


class FlopCounter(FlopCounterMode):
    """PyTorch's counter, known to `uncounted` while it is open; it counts all modules as one."""

    running: ClassVar[list[FlopCounter]] = []
    mod_tracker: Any

    def __enter__(self) -> FlopCounter:
        self.mod_tracker = NullModuleTracker()
        self.running.append(self)
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> Any:
        self.running.remove(self)
        return super().__exit__(*failure)


@contextmanager
def pause_counting() -> Iterator[None]:
    """Inside, open counters do not move: for work that belongs to the machine and not to the model."""
    before = [(one, copy.deepcopy(one.flop_counts)) for one in FlopCounter.running]
    try:
        yield
    finally:
        for one, counts in before:
            one.flop_counts = counts


def build_flop_counter() -> FlopCounter:
    """PyTorch's counter for real runs, counting as this module does.

    Its own table lacks the processor's attention and grouped products, and counts scores that a fused backward pass
    computes again.
    """
    aten = torch.ops.aten
    backward = (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
    )
    table: dict[Any, Any] = {
        getattr(aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flops
        for name in backward
    }
    table[aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    table[aten._grouped_mm] = _grouped_mm_flops
    return FlopCounter(display=False, custom_mapping=table)


def _config(model: Checkpoint | Config) -> Config:
    return model if isinstance(model, Mapping) else model.config


def _attention_flops(query: Shape, key: Shape, value: Shape, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(
    grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **named: Any
) -> int:
    return 2 * int(sdpa_flop_count(query, key, value))


def _grouped_mm_flops(left: Shape, right: Shape, *rest: Any, **named: Any) -> int:
    """Rows in groups, each times its own matrix, or summed over groups: every row is used once."""
    return 2 * math.prod(left[-2:]) * right[-1]
