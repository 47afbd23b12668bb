"""FLOPs of a forward pass and of a training step, from a config alone: no weights, no model.

A multiply-add is 2 and only matrix products count, as in `torch.utils.flop_counter`: every map
2 * in * out per position that it is applied to, attention over all pairs of positions, masked ones
included. A training step is a forward and a backward pass, which has a product for each of the two
operands of every product in the forward pass. What a kernel or gradient checkpointing computes a
second time is not counted, so that a number belongs to the model and not to the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from ..core.anatomy import Config, find_anatomy
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..families.multimodal.two_towers import TOWERS, TwoTowerAnatomy
from ..mixers.attention import Attention
from ..mixers.registry import mixer_class

Shape = tuple[int, ...]


def forward_flops(model: Checkpoint | Config, length: int, batch: int = 1) -> int:
    """FLOPs of one forward pass.

    Args:
        model: a checkpoint, or the mapping in a config.json.
        length: tokens per row; a linearized model's row is one document. Images have the length
            that the config says.
        batch: rows.

    Raises RegraftError for a length that the model does not have.
    """
    return batch * row_flops(model, length)[0]


def training_flops(model: Checkpoint | Config, length: int, batch: int = 1) -> int:
    """FLOPs of one forward and backward pass with every weight trained.

    Arguments and errors as in `forward_flops`.
    """
    return batch * sum(row_flops(model, length))


def row_flops(model: Checkpoint | Config, length: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of one row of `length` tokens."""
    config = _config(model)
    length = count_positions(config, length)
    towers = find_anatomy(config)
    if isinstance(towers, TwoTowerAnatomy):
        each = [row_flops(towers.tower_config(config, tower), length) for tower in TOWERS]
        return sum(one[0] for one in each), sum(one[1] for one in each)
    costs = [weight_flops(config, length)]

    # Softmax attention: scores and weighted sum, 2 * dim each for every pair of positions; values
    # may have a width of their own.
    anatomy, sizes = find_anatomy(config), find_anatomy(config).solve(config)
    width = sizes["dim"] + sizes.get("value", sizes["dim"])
    pair = 2 * sizes["kv"] * sizes["group"] * width
    softmax = pair * length**2
    if "encoder_depth" in sizes:  # the encoder's own attention, and the decoder's to it
        row = sizes.get("place", length)
        read = pair * row * (sizes["encoder_depth"] * row + sizes["depth"] * length)
        costs.append((read, 2 * read))
    for layer, spec in enumerate(config.get("mixers") or [None] * sizes["depth"]):
        if spec is None:
            costs.append((softmax, 2 * softmax))
        else:
            attention = Attention(**anatomy.attention(config, layer))
            costs.append(mixer_class(spec["name"]).row_flops(attention, spec, length))
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


def weight_flops(model: Checkpoint | Config, length: int) -> tuple[int, int]:
    """(forward, backward) FLOPs of the products with weights on a row of `length` positions.

    A head is a product too when it is tied to the embedding.
    """
    config = _config(model)
    anatomy = find_anatomy(config)
    family, full, sizes = anatomy.host(config), anatomy.fill_defaults(config), anatomy.solve(config)

    # How often a weight is applied on a row, by its part's `at`. A router sends each position to
    # some experts, so one expert sees a fraction of them.
    routed = Fraction(length * full[family.routed], sizes["expert"]) if family.routed else 0
    # Patches are embedded before some are left out.
    patches = sizes["pos"] - 1 if family.inputs == "masked pixels" else length - 1
    applications: dict[str, int | Fraction] = {"each": length, "first": 1, "last": 1, "image": 0}
    applications |= {"patch": patches, "routed": routed}

    row = sizes.get("place", length)  # of an encoder in front of the decoder; audio has one length
    applications |= {"source": row, "frame": 2 * row}

    forward, backward = Fraction(0), Fraction(0)
    for placed in anatomy.place(anatomy.untie_embeddings(config)).values():
        part = placed.part
        if part.is_matrix:
            cost = 2 * math.prod(placed.shape) * applications[part.at]
            # Backward: a product for the weight and one for its input; pixels need no gradient.
            forward, backward = (
                forward + cost,
                backward + cost * (1 if part.at in ("patch", "frame") else 2),
            )
    return int(forward), int(backward)


def count_positions(model: Checkpoint | Config, length: int) -> int:
    """Positions of a row: `length` tokens, or an image's patches and its class token.

    Raises RegraftError for a length that the model has no position embeddings for.
    """
    config = _config(model)
    anatomy = find_anatomy(config)
    most = anatomy.solve(config).get("pos")
    inputs = anatomy.host(config).inputs
    if most and inputs == "masked pixels":
        hidden_share = float(anatomy.fill_defaults(config)["mask_ratio"])
        return 1 + int((most - 1) * (1 - hidden_share))
    if most and inputs in ("pixels", "spectrogram"):
        return most
    if length < 1 or (most and length > most):
        raise RegraftError(
            f"rows of {length} tokens in a {anatomy.family}: give 1 to {most or 'any number'}"
        )
    return length


class FlopCounter(TorchDispatchMode):
    """Inside, counts the products of every operation that PyTorch has a formula for.

    Operations run as they are, so that counting changes no bit of a result. PyTorch's own
    `FlopCounterMode` decomposes those that it has no formula for, which rounds otherwise, and its
    record of modules keeps tensors alive that gradient checkpointing would free.
    """

    # Open counters, for `pause_counting`.
    running: ClassVar[list[FlopCounter]] = []

    def __init__(self, formulas: Mapping[Any, Callable[..., int]]):
        """Count nothing yet.

        Args:
            formulas: of operations that PyTorch's table lacks or counts otherwise; they get the
                shapes of the operation's arguments.
        """
        super().__init__()
        own = {operation: shape_wrapper(formula) for operation, formula in formulas.items()}
        self.flop_registry = flop_registry | own
        self.total = 0
        self.paused = False

    def __enter__(self) -> FlopCounter:
        self.running.append(self)
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> Any:
        self.running.remove(self)
        return super().__exit__(*failure)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self.flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None and not self.paused:
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    def get_total_flops(self) -> int:
        """What was counted."""
        return self.total


@contextmanager
def pause_counting() -> Iterator[None]:
    """Inside, open counters do not count: for work of the machine and not of the model."""
    counting = [counter for counter in FlopCounter.running if not counter.paused]
    for counter in counting:
        counter.paused = True
    try:
        yield
    finally:
        for counter in counting:
            counter.paused = False


def build_flop_counter() -> FlopCounter:
    """A counter for real runs, counting as this module does.

    PyTorch's own table lacks attention on the CPU and grouped products, and counts the scores that
    a fused backward pass computes again.
    """
    aten = torch.ops.aten
    fused = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    table: dict[Any, Any] = {}
    for name in fused:
        operation = getattr(aten, f"_scaled_dot_product_{name}_backward")
        table[operation] = _attention_backward_flops
    table[aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    table[aten._grouped_mm] = _grouped_mm_flops
    return FlopCounter(table)


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
