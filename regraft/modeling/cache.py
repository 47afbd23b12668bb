"""Mixer states inside transformers' cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
)

# The layer type under which transformers' caches find `MixerState`. Named after this module: copies
# of it, saved with models, each register their own, and none takes another's place.
STATE_LAYER = f"{__name__}.MixerState"
# The same for layers that have a state of the source's beside attention, as all of Falcon-H1's do.
BESIDE_LAYER = f"{__name__}.MixerStateBeside"
# Words for such layers: those of transformers, and ours where a view is made of a view.
BESIDE_KINDS = ("hybrid", "hybrid_sliding", BESIDE_LAYER)
# The argument of models that takes a cache; transformers 5.24 renamed it.
_STOCK = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _STOCK else "past_key_values"


@dataclass
class RecordedBlock:
    """Tokens of one call, so that some of them can be taken back.

    Attributes:
        tokens: how many.
        before: the state before them.
        replay: computes the state after the first N of them.
    """

    tokens: int
    before: dict[str, torch.Tensor]
    replay: Callable[[int], dict[str, torch.Tensor]]


class MixerState(CacheLayerMixin):
    """The state of one layer's mixer, of constant size.

    Attributes:
        state: named tensors, with the batch as their first axis.
        cumulative_length: positions that went into it.
        record_past: whether blocks are kept until the next `crop`, as assisted decoding asks for.
        blocks: those since the last `crop`.
    """

    _layer_type: str | None = STATE_LAYER
    is_sliding = False
    is_mixer_state = True

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.state: dict[str, torch.Tensor] = {}
        self.cumulative_length = 0
        self.record_past = False
        self.blocks: list[RecordedBlock] = []

    def store(
        self,
        state: dict[str, torch.Tensor],
        tokens: int,
        replay: Callable[[int], dict[str, torch.Tensor]],
    ) -> None:
        """Replace the state by a later one.

        Args:
            state: after `tokens` more positions.
            tokens: how many.
            replay: computes the state after the first N of them.
        """
        if self.record_past:
            self.blocks.append(RecordedBlock(tokens, self.state, replay))
        self.state = state
        self.cumulative_length += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the mixer makes its first state."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise TypeError: softmax attention cannot use a mixer's state."""
        raise TypeError(
            "a mixer's state holds no keys and values: this cache belongs to a model with other "
            "layers"
        )

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(positions, offset) as of a full-attention layer.

        transformers makes the masks of softmax layers from any layer of the cache.
        """
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def _map(self, change: Any) -> None:
        self.blocks = []  # they are of the rows that were
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def reset(self) -> None:
        """Return to the state before the first token."""
        self.state, self.cumulative_length, self.is_initialized = {}, 0, False
        self.blocks = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows of the beams that go on."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select these rows."""
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """States are moved by the mixer's own arithmetic; nothing waits on a device."""

    @property
    def is_croppable(self) -> bool:
        """Whether the tokens since the last `crop` can be taken back."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, and forget how to take back the others.

        What is computed again is at most one call's tokens.

        Args:
            tokens_to_remove: how many, as a negative number.

        Raises ValueError, changing nothing, for more tokens than were recorded.
        """
        left = abs(tokens_to_remove)
        known = sum(block.tokens for block in self.blocks)
        if tokens_to_remove > 0 or left > known:
            raise ValueError(
                f"cannot take {left} tokens back out of a recurrent state, {known} are kept: call"
                " `activate_past_recording` before they are read, and give a negative number"
            )

        self.cumulative_length -= left
        while left:
            block = self.blocks.pop()
            kept = max(0, block.tokens - left)
            self.state = block.replay(kept) if kept else block.before
            left -= block.tokens - kept
        self.blocks = []


class StaticMixerState(MixerState):
    """The same in a static cache, whose layers have a constant size: a mixer's state has one."""

    _layer_type: str | None = None  # it would take the place of `MixerState` in other caches

    def __init__(self, max_cache_len: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(places, offset) as of a static layer with keys and values."""
        return self.max_cache_len, 0

    @property
    def is_compileable(self) -> bool:
        """Whether all shapes stay; transformers then masks the places of tokens to come."""
        return not self.record_past


class MixerStateBeside(LinearAttentionLayer, MixerState):
    """The state of a mixer, and in the same layer the convolution and recurrence of the source."""

    _layer_type: str | None = BESIDE_LAYER

    def __init__(self, number_of_states: int = 1, **kwargs: Any):
        MixerState.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the source's states; the mixer makes its own."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def _map(self, change: Any) -> None:
        MixerState._map(self, change)
        for states in (self.conv_states, self.recurrent_states):
            for index, tensor in states.items():
                states[index] = None if tensor is None else change(tensor)

    def reset(self) -> None:
        """Return to the states before the first token."""
        LinearAttentionLayer.reset(self)
        MixerState.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows of the beams that go on."""
        MixerState.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        """Move to the CPU."""
        MixerState.offload(self)

    def prefetch(self) -> None:
        """Move the source's states back to their device."""
        LinearAttentionLayer.prefetch(self)

    @property
    def is_croppable(self) -> bool:
        """False: what went into the source's recurrence cannot be taken back."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: a state that is replaced has no address of its own."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError for any token: see `is_croppable`."""
        if tokens_to_remove:
            raise ValueError(
                f"cannot take {abs(tokens_to_remove)} tokens back out of a recurrence of the source"
            )


class StaticMixerStateBeside(MixerStateBeside):
    """The same in a static cache."""

    _layer_type: str | None = None  # as in `StaticMixerState`

    def __init__(self, max_cache_len: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(places, offset) as of a static layer with keys and values."""
        return self.max_cache_len, 0


STATIC_LAYER_TYPE_MAPPING[STATE_LAYER] = StaticMixerState
STATIC_LAYER_TYPE_MAPPING[BESIDE_LAYER] = StaticMixerStateBeside


def is_mixer_state(layer: Any) -> bool:
    """Whether a layer of a cache is a `MixerState`, be it of this module or of a saved copy."""
    return getattr(layer, "is_mixer_state", False)


def cache_kwargs(cache: Cache | None) -> dict[str, Any]:
    """Keyword arguments that pass a cache to any model; none for None."""
    return {} if cache is None else {CACHE: cache}


def cache_of(output: Any) -> Cache:
    """The cache that a model's output holds."""
    found: Cache = getattr(output, CACHE)
    return found


def state_bytes(cache: Cache) -> list[int]:
    """Bytes of each layer of a cache: mixer states, keys and values, states that a source has."""
    return [
        sum(tensor.numel() * tensor.element_size() for tensor in list_states(layer))
        for layer in cache.layers
    ]


def list_states(layer: Any) -> list[torch.Tensor]:
    """The tensors that a layer of a cache holds."""
    found = [getattr(layer, name, None) for name in ("keys", "values")]
    if is_mixer_state(layer):
        found = list(layer.state.values())
    for name in ("conv_states", "recurrent_states"):
        found += getattr(layer, name, {}).values()
    return [tensor for tensor in found if tensor is not None]
