"""Tensors without numbers: models of which only shapes exist, and a count of the bytes alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..modeling.meta import build_from_config
from ..train.layer_subset import SkippedLayer, layer_stack

# What depends on numbers, such as how many first tokens of documents a packed row has.
FAKE_COUNT = 16


class LiveMemoryCounter(TorchDispatchMode):
    """Adds up the storages that are alive of those made inside.

    It sees every operation, those of autograd included. A storage that several tensors share
    counts once, and until the last of them is freed.

    Attributes:
        now: bytes alive.
        peak: the most there ever were.
    """

    def __init__(self, known: Collection[Tensor]):
        """Begin at zero.

        Args:
            known: tensors made before, which do not count.
        """
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        is_fake = args and isinstance(args[0], FakeTensor)
        run = STAND_INS.get(func, func) if is_fake else func
        out = run(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count_storage(value.untyped_storage())
        return out

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is known, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.on_free, key, size)

    def on_free(self, key: int, size: int) -> None:
        """A storage was freed; its address may be given to another one."""
        self.known.discard(key)
        self.now -= size


def fake_nonzero(mask: Tensor) -> Tensor:
    """Indices of what is not zero, as many as there may be: only numbers would tell how many."""
    return torch.zeros(min(FAKE_COUNT, mask.shape[0]), mask.ndim, dtype=torch.long)


def fake_number(count: Tensor) -> int:
    """A count; RegraftError for another number, which nothing stands in for."""
    if count.dtype != torch.long:
        raise RegraftError(
            f"a model asks for a number of {count.dtype} that only data can say: leave out --train"
            " and measure a step, or report this"
        )
    return FAKE_COUNT


def fake_grouped_mm(left: Tensor, right: Tensor, ends: Tensor, *rest: Any, **named: Any) -> Tensor:
    """The products of a mixture's experts, which fake tensors have in bfloat16 alone.

    Args:
        left: rows of all groups one after the other, (rows, in); or (in, rows) with a 2-D `right`.
        right: one matrix per group, (groups, in, out); or (rows, out): then one product per group.
        ends: where each group ends, (groups,).
        rest: not needed for the shape, as `named`.
        named: see `rest`.
    """
    if right.ndim == 3:
        return left.new_empty((len(left), right.shape[-1]))
    return left.new_empty((len(ends), left.shape[0], right.shape[-1]))


STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.nonzero.default: fake_nonzero,
    torch.ops.aten._local_scalar_dense.default: fake_number,
    torch.ops.aten._grouped_mm.default: fake_grouped_mm,
}
"""What is run instead of operations that fake tensors cannot do."""


@contextmanager
def keep_only_layers(model: PreTrainedModel, layers: Collection[int]) -> Iterator[None]:
    """While inside, all other layers of the stack pass on what they get."""
    modules = layer_stack(model)
    removed = {index: module for index, module in enumerate(modules) if index not in layers}
    try:
        for index in removed:
            modules[index] = SkippedLayer()
        yield
    finally:
        for index, module in removed.items():
            modules[index] = module


def build_fake_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The float32 model of a checkpoint in eval mode; call it inside a FakeTensorMode."""
    with no_init_weights():
        model: PreTrainedModel = build_from_config(checkpoint)
    return model
