"""Tensors without numbers: models and operations of which only shapes exist, and a count of the bytes alive."""

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
from ..modeling.meta import build_from_config
from ..train.layer_subset import SkippedLayer, layer_stack

FAKE_NONZERO_ROWS = 16  # places of a search, such as sinks of all documents in a row


class LiveMemoryCounter(TorchDispatchMode):
    """Adds up the storages that are alive of those made inside; `peak` is the most there ever was."""

    def __init__(self, known: Collection[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = STAND_INS.get(func) if args and isinstance(args[0], FakeTensor) else None
        out = (stand_in or func)(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if (
                isinstance(value, Tensor)
                and (key := value.untyped_storage()._cdata) not in self.known
            ):
                storage = value.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.on_free, key, storage.nbytes())
        return out

    def on_free(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.known.discard(key)
        self.now -= size


def fake_nonzero(found: Tensor) -> Tensor:
    """Places of what is not zero: how many there are is known from numbers alone."""
    return torch.zeros(min(FAKE_NONZERO_ROWS, found.shape[0]), found.ndim, dtype=torch.long)


def fake_grouped_mm(left: Tensor, right: Tensor, ends: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Experts' products, which fake tensors have in bfloat16 alone: rows by their group's matrix, or one per group."""
    shape = (
        (len(left), right.shape[-1])
        if right.ndim == 3
        else (len(ends), left.shape[0], right.shape[-1])
    )
    return left.new_empty(shape)


STAND_INS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.nonzero.default: fake_nonzero,
    torch.ops.aten._grouped_mm.default: fake_grouped_mm,
}


@contextmanager
def keep_only_layers(model: PreTrainedModel, layers: Collection[int]) -> Iterator[None]:
    """Inside, all other layers of the stack pass on what they get."""
    modules = layer_stack(model)
    away = {at: module for at, module in enumerate(modules) if at not in layers}
    try:
        for at in away:
            modules[at] = SkippedLayer()
        yield
    finally:
        for at, module in away.items():
            modules[at] = module


def build_fake_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The float32 model of a checkpoint on fake tensors, in eval mode; inside a FakeTensorMode."""
    with no_init_weights():
        model: PreTrainedModel = build_from_config(checkpoint)
    return model
