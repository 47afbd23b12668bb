"""A cache of keys and values that grows in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer

# The layer type under which transformers' caches find `GrowingLayer`; see `cache.STATE_LAYER`.
GROWING_LAYER = f"{__name__}.GrowingLayer"
SPARE = 8  # one part in so many of the tokens held is allocated beyond them
LEAST = 256  # tokens, and at least so many


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, written behind those before them.

    transformers' own layer copies all keys and values for every call, which takes longer than
    attention to them where few tokens are read at a time. Where gradients go through the cache, or
    in a graph, this one does as well.

    Attributes:
        keys, values: (batch, kv, tokens, dim), views of the buffers.
        buffers: the same with room for more tokens.
    """

    _layer_type: str | None = GROWING_LAYER

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (batch, kv, new tokens, dim); all of them, as views."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = []
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

        tokens = self.keys.shape[2]
        total = tokens + key_states.shape[2]
        if not self.has_room(total):
            self.buffers = [grow(part, total) for part in (self.keys, self.values)]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, tokens:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self.buffers)
        return self.keys, self.values

    def has_room(self, total: int) -> bool:
        """Whether the buffers hold what `keys` and `values` do, and `total` tokens fit in."""
        if not self.buffers or self.buffers[0].shape[2] < total:
            return False
        if self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch does not let it be written here
        # What selects or repeats rows makes tensors of its own.
        held = zip(self.buffers, (self.keys, self.values), strict=True)
        return all(
            buffer.data_ptr() == part.data_ptr() and buffer.shape[:2] == part.shape[:2]
            for buffer, part in held
        )


# A static cache has room for all tokens from the start.
STATIC_LAYER_TYPE_MAPPING[GROWING_LAYER] = StaticLayer


def grow(part: torch.Tensor, total: int) -> torch.Tensor:
    """A buffer that begins with `part` (batch, kv, tokens, dim), for `total` tokens and some."""
    b, kv, tokens, dim = part.shape
    buffer = part.new_empty(b, kv, total + max(LEAST, total // SPARE), dim)
    buffer[:, :, :tokens] = part
    return buffer


def build_growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """transformers' cache for a model, whose layers with all keys and values grow in place."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
