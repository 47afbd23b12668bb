"""Where mixers stand in a host's decoder layers, and which tokens they get."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..core.shapes import Bool, Float, Int
from ..errors import RegraftError
from ..mixers.attention import Attention, split_complex
from ..mixers.base import MixerContext, State
from ..mixers.registry import build
from .cache import CACHE, is_mixer_state

# Names under which decoder layers pass the cache to their attention.
CACHES = (CACHE, "layer_past")
Rotary = tuple[Tensor, Tensor]  # cos and sin
# Axes of positions with M-RoPE: those in the text, then time, height and width.
TEXT_AND_IMAGE = 4


@dataclass(frozen=True)
class RowLayout:
    """Which tokens of a call count, and to which documents they belong.

    Mixers get the tokens of a row that count side by side and padding behind them, wherever the
    padding was: so they need to know of padding at the end alone.
    """

    # Which tokens count, (batch, time); None: all do.
    counted: Bool[Tensor, "batch time"] | None = None
    # The same once they are side by side.
    valid: Bool[Tensor, "batch time"] | None = None
    # The place that each of those has in the call, (batch, time); None: they stay where they are.
    order: Int[Tensor, "batch time"] | None = None
    # Document of each token of a packed row, (batch, time); None: one document.
    segments: Int[Tensor, "batch time"] | None = None

    @classmethod
    def of_mask(cls, counted: Bool[Tensor, "batch time"]) -> RowLayout:
        """The layout of rows with padding."""
        if counted.shape[1] == 1:
            return cls(counted, counted)
        # Stable: tokens that count keep their order.
        order = (~counted).long().argsort(dim=1, stable=True)
        places = torch.arange(counted.shape[1], device=counted.device)
        return cls(counted, places < counted.sum(1, keepdim=True), order)

    def first(self, tokens: int) -> RowLayout:
        """The layout of the first tokens of the call."""
        if self.counted is not None:
            return RowLayout.of_mask(self.counted[:, :tokens])
        return RowLayout(segments=None if self.segments is None else self.segments[:, :tokens])

    def gather(self, x: Float[Tensor, "rows time width"]) -> Float[Tensor, "batch time width"]:
        """Tokens that count first."""
        if self.order is None:
            return x
        x = x.expand(self.order.shape[0], -1, -1)
        return x.gather(1, self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def scatter(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The inverse of `gather`."""
        if self.order is None:
            return x
        return x.gather(1, self.order.argsort(1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class MixerSlot(nn.Module):
    """A mixer where the host's decoder layer expects its attention module.

    Args:
        spec: of the mixer.
        attention: that it takes the place of.
        layer: its number.
        names: of the arguments that the attention module takes by position.
        gets_rows: whether the host passes `rows` through; else they are handed over by `hand_rows`.
        tables: what makes cos and sin of positions, in classes whose attention modules do so.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        attention: Attention,
        layer: int,
        names: tuple[str, ...] = ("hidden_states", "position_embeddings"),
        gets_rows: bool = True,
        tables: nn.Module | None = None,
    ):
        super().__init__()
        self.mixer = build(spec, attention)
        self.layer, self.rotary = layer, attention.rotary
        self.names, self.gets_rows = names, gets_rows
        self.rows: RowLayout | None = None
        self.rotary_emb = tables

    def forward(
        self, *given: Any, rows: RowLayout | None = None, **named: Any
    ) -> tuple[Float[Tensor, "batch time hidden"], None]:
        """The mixer's output, and None in the place of attention weights.

        Args:
            given: what the host passes by position; first the input, (batch, time, hidden).
            rows: padding and documents, from hosts that pass them through.
            named: what else the host passes. Read are the cache, `position_embeddings` (cos and
                sin, or one complex tensor) and `residual`, which some classes add to the output of
                their attention.

        Raises RegraftError when the cache has keys and values for this layer, and when padding and
        documents are not known.
        """
        arguments = dict(zip(self.names, given, strict=False)) | named
        hidden_states = arguments[self.names[0]]
        rows = rows or self.rows
        if rows is None:
            raise RegraftError(
                f"layer {self.layer} was not told of padding and documents, which its class does"
                " not pass on: call the whole model, without transformers' gradient checkpointing"
                " (regraft's own works)"
            )
        caches = [arguments[name] for name in CACHES if arguments.get(name) is not None]
        entry = caches[0].layers[self.layer] if caches else None
        if entry is not None and not is_mixer_state(entry):
            raise RegraftError(
                f"layer {self.layer} got a {type(entry).__name__} cache but holds a mixer: pass "
                "DynamicCache(config=model.config) or no cache"
            )

        before = entry.state if entry is not None else None
        rotary = arguments.get("position_embeddings") if self.rotary else None
        if self.rotary and self.rotary_emb is not None:
            rotary = self.rotary_emb(hidden_states, arguments["position_ids"])
        rotary = split_complex(rotary)
        # Nobody sees the state again where no block is recorded, no gradient and no graph made.
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        overwrite = entry is not None and not entry.record_past and not traced
        y, state = self.mix(hidden_states, rotary, rows, before, overwrite)

        def replay(tokens: int) -> State:
            part = None if rotary is None else (rotary[0][:, :tokens], rotary[1][:, :tokens])
            return self.mix(hidden_states[:, :tokens], part, rows.first(tokens), before)[1]

        if entry is not None:
            entry.store(state, hidden_states.shape[1], replay)
        residual = arguments.get("residual")
        return y if residual is None else y + residual, None

    def mix(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        rotary: Rotary | None,
        rows: RowLayout,
        state: State | None,
        overwrite: bool = False,
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """The mixer's output and the state after the last token.

        Args:
            hidden_states: input of the slot.
            rotary: cos and sin, (1 or batch, time, rotary); None: nothing is rotated.
            rows: padding and documents.
            state: before these tokens.
            overwrite: whether the new state may take its place in memory.
        """
        if rotary is not None:
            rotary = rows.gather(rotary[0]), rows.gather(rotary[1])
        mixing = MixerContext(rotary, rows.valid, rows.segments, overwrite)
        y, state = self.mixer(rows.gather(hidden_states), mixing, state)
        return rows.scatter(y), state


def name_arguments(attention: nn.Module) -> tuple[str, ...]:
    """The arguments that a host's attention module takes by position."""
    return tuple(inspect.signature(type(attention).forward).parameters)[1:]


@functools.cache
def passes_keywords(forward: Callable[..., Any], part: str) -> bool:
    """Whether a module of a host passes keyword arguments that it does not know on to a part.

    Args:
        forward: of the module's class.
        part: its attribute that holds the part.
    """
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    calls = (node for node in ast.walk(source) if isinstance(node, ast.Call))
    own = [call for call in calls if ast.unparse(call.func) == f"self.{part}"]
    return any(keyword.arg is None for call in own for keyword in call.keywords)


def hand_positions(model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Keep the positions of a call for the backbone, whose head's class does not pass them on."""
    model.backbone().handed_positions = named.get("position_ids")


@contextmanager
def hand_rows(slots: Iterable[nn.Module], rows: RowLayout | None) -> Iterator[None]:
    """Inside, slots whose host passes nothing on know padding and documents.

    Args:
        slots: of a model; others than such ones stay as they are.
        rows: of the call.
    """
    told = [slot for slot in slots if isinstance(slot, MixerSlot) and not slot.gets_rows]
    for slot in told:
        slot.rows = rows
    try:
        yield
    finally:
        for slot in told:
            slot.rows = None


def find_counted(
    mask: Tensor | dict[str, Tensor | None], time: int, cache: Cache | None
) -> Bool[Tensor, "batch time"] | None:
    """Which of the last `time` tokens count; None: all do.

    Args:
        mask: (batch, cached tokens + time), 1 where a token counts; or as `generate` makes it for a
            static cache, (batch, 1, time, places): which places of the cache each token sees, as
            booleans or as numbers that are added to the scores; where layers have several types,
            one such mask, or None, per type.
        time: tokens of this call.
        cache: with the tokens before them.

    Raises RegraftError for any other mask.
    """
    sliding = cache is not None and True in cache.is_sliding
    if isinstance(mask, dict):
        # Each says it; the places of a full one are positions.
        sliding = sliding and "full_attention" not in mask
        one = mask.get("full_attention", next(iter(mask.values())))
        if one is None:
            return None
        mask = one
    if mask.ndim == 2:
        return mask[:, -time:].bool()
    if mask.ndim != 4 or mask.shape[1:3] != (1, time):
        raise RegraftError(
            f"attention_mask has shape {tuple(mask.shape)}: mixers take (batch, time), 1 where a "
            "token counts"
        )
    # A token that counts sees itself.
    seen = mask if mask.dtype == torch.bool else mask >= 0
    queries = torch.arange(time, device=mask.device)
    before = 0 if cache is None else cache.get_seq_length()
    if cache is not None and sliding:
        # The first places have left the window.
        before -= cache.layers[cache.is_sliding.index(True)].get_mask_sizes(time)[1]
    return seen[:, 0, queries, queries + before]


def lay_out_rows(
    time: int,
    mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Int[Tensor, "rows time"] | None,
    cache: Cache | None,
) -> RowLayout:
    """Padding and documents of the last `time` tokens.

    Args:
        time: tokens of this call.
        mask: (batch, cached tokens + time), 1 where a token counts, or as in `find_counted`.
        position_ids: positions of the tokens, which restart at each document of a packed row;
            with M-RoPE (axes, rows, time).
        cache: rows that go on from a cache are not packed.

    Raises RegraftError for a mask that is not 2-D.
    """
    # A graph cannot depend on numbers: it takes the way that is right for all of them.
    traced = torch.compiler.is_compiling()
    if mask is not None:
        valid = find_counted(mask, time, cache)
        if valid is None or (not traced and bool(valid.all())):
            return RowLayout()  # mixers have a shorter way for that
        return RowLayout.of_mask(valid)

    if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == TEXT_AND_IMAGE:
        position_ids = position_ids[0]
    if cache is None and position_ids is not None and position_ids.ndim == 2 and time > 1:
        restart = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if traced or bool(restart.any()):
            segments = torch.nn.functional.pad(restart.long().cumsum(1), (1, 0))
            return RowLayout(segments=segments)
    return RowLayout()


def check_cache_reached(cache: Cache, time: int) -> None:
    """Raise RegraftError when the host did not pass the cache on to a mixer.

    Such a mixer would silently forget all tokens before the current call.

    Args:
        cache: after a forward pass.
        time: tokens in that pass.
    """
    states = [layer for layer in cache.layers if is_mixer_state(layer)]
    if any(state.get_seq_length() < time for state in states):
        raise RegraftError(
            f"transformers {transformers.__version__} hands no cache to attention under the "
            f"names {', '.join(CACHES)}: install the version that regraft was tested with "
            "(constraints.txt)"
        )
