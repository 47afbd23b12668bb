"""Sliding-window softmax attention with sink tokens: the source's own attention under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float, Int
from .attention import Attention, spread_heads
from .base import Mixer, MixerContext, State
from .naive_window import EMPTY
from .tensors import is_writable, pad_time, take_tokens
from .weight_spec import WeightSpec

SINKS = "attn.sinks.weight"  # role of an attention's learned sinks


@dataclass(frozen=True)
class WindowOptions:
    """What a token sees."""

    window: int = 64  # the last tokens, the token itself included
    sinks: int = 4  # and the first tokens of its document


class Window(Mixer):
    """Sliding window with attention sinks (StreamingLLM, Xiao et al., arXiv 2309.17453).

    Positions are the source's. Blocks of `window` queries see two blocks of keys and the sinks, so
    that cost is linear in length. The state is the last `window` keys and values and the sinks, of
    constant size: `k` and `v` (batch, kv, window + sinks, dim), their positions `at` (batch, window
    + sinks), and `seen` (batch, 1), the tokens so far. The window is a ring: a new token takes the
    slot of the oldest, wherever that is. Slot i of the sinks, behind it, is for position i.
    """

    name = "window"
    Options: ClassVar[type] = WindowOptions
    expand = False
    is_window = True
    # Logit of each head's sink, (heads,); None: there are none.
    sinks: nn.Parameter | None

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.add_projections(expand=False)
        sinks = nn.Parameter(torch.zeros(attention.heads)) if attention.sinks else None
        self.register_parameter("sinks", sinks)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """The source's projections, and its sinks where it has them."""
        table = super().weights(attention, spec, output)
        sinks = WeightSpec("-> kv group", SINKS, decay=False)
        return table | ({"sinks": sinks} if attention.sinks else {})

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Keys, values and positions of the window and the sinks."""
        options = cls.parse(spec)
        per_token = attention.kv * (attention.dim + attention.value_dim) + 1
        return (options.window + options.sinks) * per_token + 1

    @classmethod
    def softmax_tokens(cls, spec: dict[str, Any]) -> int:
        """The window, where all projections are the source's."""
        window: int = cls.parse(spec).window
        return window if spec.get("inherit", "all") == "all" else 0

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Scores and weighted sum over window and sinks."""
        options = cls.parse(spec)
        pair = 2 * attention.heads * (attention.dim + attention.value_dim)
        return pair * (options.window + options.sinks)

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """Blocks of queries against two blocks of keys and the sinks beyond the window."""
        options = cls.parse(spec)
        queries, keys = length, options.window + length
        if length > options.window:
            queries = -(-length // options.window) * options.window
            keys = 2 * options.window + options.sinks
        pair = 2 * attention.heads * (attention.dim + attention.value_dim)
        forward = pair * queries * keys
        return forward, 2 * forward

    def input_layers(self) -> list[nn.Linear]:
        """Queries, keys and values too."""
        return [self.q_proj, self.k_proj, self.v_proj, *super().input_layers()]

    def initial_state(self, like: Float[Tensor, "batch kv time dim"]) -> State:
        """The state before the first token, with the type and place of the keys `like`."""
        (b, kv, _, d), slots = like.shape, self.options.window + self.options.sinks
        return {
            "k": like.new_zeros(b, kv, slots, d),
            "v": like.new_zeros(b, kv, slots, self.attention.value_dim),
            "at": torch.full((b, slots), EMPTY, dtype=torch.long, device=like.device),
            "seen": torch.zeros(b, 1, dtype=torch.long, device=like.device),
        }

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the state after the last token; see `Mixer.mix`."""
        q, k, v = self.qkv(x, mixing=mixing)
        q, k = self.rotate(q, k, mixing.rotary)
        begins, state = state is None, state or self.initial_state(k)
        overwrite = mixing.overwrite and mixing.segments is None and not begins

        position = self.place_tokens(x, mixing, state)
        if mixing.valid is not None:
            position = position.masked_fill(~mixing.valid, EMPTY)

        if x.shape[1] == 1:
            heads, last = self.attend_token(q, k, v, position, state, overwrite)
            return heads.transpose(1, 2), state if mixing.segments is not None else last

        old = self.split_state(state)
        keys, values = torch.cat((old["window_k"], k), 2), torch.cat((old["window_v"], v), 2)
        at = torch.cat((old["window_at"], position), 1)
        ids = self.document_ids(position, mixing.segments)
        if mixing.segments is not None:
            sinks = self.collect_sinks(k, v, position, ids)
            return self.attend_blocks(q, keys, values, at, ids, sinks).transpose(1, 2), state

        parts = self.keep_last(keys, values, at, mixing.valid is not None)
        parts |= self.keep_sinks(k, v, position, old)
        last = {
            "k": torch.cat((parts["window_k"], parts["sink_k"]), 2),
            "v": torch.cat((parts["window_v"], parts["sink_v"]), 2),
            "at": torch.cat((parts["window_at"], parts["sink_at"]), 1),
            "seen": state["seen"] + (position > EMPTY).sum(1, keepdim=True),
        }
        if begins and x.shape[1] <= self.options.window:
            # All that a query sees is in the window.
            return self.attend_blocks(q, keys, values, at, ids, None).transpose(1, 2), last
        sink_at = parts["sink_at"]
        sinks = parts["sink_k"], parts["sink_v"], sink_at, sink_at.clamp(max=0)
        return self.attend_blocks(q, keys, values, at, ids, sinks).transpose(1, 2), last

    def place_tokens(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> Int[Tensor, "batch time"]:
        """Each token's place in its document; any number on padding."""
        if state is None:
            return self.positions(x, mixing)
        # A single token is the next one, whatever the layout.
        return state["seen"] + (self.positions(x, mixing) if x.shape[1] > 1 else 0)

    def positions(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> Int[Tensor, "batch time"]:
        """How many of these tokens come before each one in its document."""
        b, t = x.shape[:2]
        if mixing.valid is not None:
            count = mixing.valid.long().cumsum(1) - 1
        else:
            count = torch.arange(t, device=x.device).expand(b, t)
        if mixing.segments is None:
            return count

        # A document's first token is the latest start so far; its count is taken off.
        first = torch.ones(b, t, dtype=torch.bool, device=x.device)
        first[:, 1:] = mixing.segments[:, 1:] != mixing.segments[:, :-1]
        return count - count.masked_fill(~first, 0).cummax(1).values

    def document_ids(
        self, position: Int[Tensor, "batch time"], segments: Int[Tensor, "batch time"] | None
    ) -> Int[Tensor, "batch time"]:
        """The document number of each token, EMPTY on padding."""
        if segments is None:
            return position.clamp(max=0)  # 0 for tokens, EMPTY for padding
        return segments.masked_fill(position == EMPTY, EMPTY)

    def split_state(self, state: State) -> State:
        """`window_k`, `window_v` and `window_at`, the oldest token first and empty slots before it,
        and `sink_k`, `sink_v` and `sink_at`.
        """
        size = self.options.window
        order = state["at"][:, :size].argsort(dim=1)
        return {
            "window_k": take_tokens(state["k"], order),
            "window_v": take_tokens(state["v"], order),
            "window_at": state["at"].gather(1, order),
            "sink_k": state["k"][:, :, size:],
            "sink_v": state["v"][:, :, size:],
            "sink_at": state["at"][:, size:],
        }

    def attend_token(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch kv 1 dim"],
        v: Float[Tensor, "batch kv 1 value"],
        position: Int[Tensor, "batch 1"],
        state: State,
        overwrite: bool = False,
    ) -> tuple[Float[Tensor, "batch heads 1 value"], State]:
        """Outputs of one token, and the state with it.

        Args:
            q, k, v: of the token.
            position: of the token, EMPTY on padding, which leaves the state of its row as it was.
            state: before the token.
            overwrite: whether the new state may take its place in memory.
        """
        size, sinks = self.options.window, self.options.sinks
        # Asked on a processor alone, which need not wait for the answer.
        known = overwrite and position.device.type == "cpu"
        least = int(position.min()) if known else EMPTY
        in_place = known and least >= sinks and is_writable(*state.values())
        last = (write_slot if in_place else fill_slots)(state, k, v, position, size)

        group = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, kv, group, d)
        distance = None
        if self.attention.alibi is not None:
            distance = (position - last["at"])[:, None, None]
        scores = self.attention.scale_scores(group @ last["k"].mT, distance)
        if least < size + sinks - 1:  # some slots are empty still
            # A sink that is still inside the window stands there too; it is counted there alone.
            far = torch.arange(sinks, device=q.device) <= position - size
            seen = torch.cat((last["at"][:, :size] > EMPTY, far), 1)
            scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        return (self.normalize(scores) @ last["v"]).flatten(1, 2).unsqueeze(2), last

    def attend_blocks(
        self,
        q: Float[Tensor, "batch heads time dim"],
        keys: Float[Tensor, "batch kv total dim"],
        values: Float[Tensor, "batch kv total value"],
        at: Int[Tensor, "batch total"],
        ids: Int[Tensor, "batch time"],
        sinks: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch heads time value"]:
        """Outputs of many tokens, in `n` blocks of `size` = window queries.

        Args:
            q: queries.
            keys, values: of the window before these tokens and of these; `total` is window + time.
            at: their positions.
            ids: document number of each of these tokens, EMPTY on padding.
            sinks: keys, values, positions and document numbers; None: no query sees any.
        """
        size, (heads, time), kv = self.options.window, q.shape[1:3], keys.shape[1]
        n, group = -(-time // size), heads // kv

        # A query sees back into the block before its own, the first block into the state's window:
        # n + 1 blocks of keys give n pairs. A single block has no more rows than there are tokens.
        rows = size if n > 1 else time
        position = at[:, size:]
        key_ids = torch.cat((at[:, :size].clamp(max=0), ids), 1)
        key_at, key_ids = (
            _pair_blocks(_pad_ids(x, rows) if n > 1 else x, n) for x in (at, key_ids)
        )
        query_at, query_ids = (_pad_ids(x, rows).unflatten(1, (n, rows)) for x in (position, ids))

        # Whether a query of a block sees a key of its two, and a sink beyond its window.
        distance = query_at.unsqueeze(-1) - key_at.unsqueeze(-2)
        seen = (distance >= 0) & (distance < size) & (key_at.unsqueeze(-2) > EMPTY)
        seen = seen & (query_ids.unsqueeze(-1) == key_ids.unsqueeze(-2))
        more: list[tuple[Tensor, ...]] = [(), ()]
        if sinks is not None:
            sink_k, sink_v, sink_at, sink_ids = sinks
            from_sinks = query_at.unsqueeze(-1) - sink_at[:, None, None]
            far = (from_sinks >= size) & (
                (sink_at > EMPTY)[:, None, None]
                & (query_ids.unsqueeze(-1) == sink_ids[:, None, None])
            )
            seen = torch.cat((seen, far), -1)  # (batch, n, rows, keys)
            distance = torch.cat((distance, from_sinks), -1)
            more = [(x.unsqueeze(1).expand(-1, n, -1, -1, -1),) for x in (sink_k, sink_v)]

        # Blocks join the batch: (batch * n, kv, keys or group * rows, dim).
        keys, values = (
            _pair_blocks(pad_time(x, rows) if n > 1 else x, n, *after).flatten(0, 1)
            for x, after in zip((keys, values), more, strict=True)
        )
        blocks = pad_time(q, rows).unflatten(1, (kv, group)).unflatten(3, (n, rows))
        queries = blocks.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)

        unseen = (~seen).flatten(0, 1).repeat(1, group, 1).unsqueeze(1)
        # What is masked gets the smallest number, not -inf: padding sees no key.
        attention = self.attention
        plain = attention.softcap is None and attention.alibi is None and self.sinks is None
        if plain and not torch.is_grad_enabled() and q.dtype == values.dtype:
            bias = q.new_zeros(unseen.shape).masked_fill_(unseen, torch.finfo(q.dtype).min)
            scale = attention.scale
            out = F.scaled_dot_product_attention(queries, keys, values, bias, scale=scale)
        else:
            far = None
            if attention.alibi is not None:
                far = distance.flatten(0, 1).repeat(1, group, 1).unsqueeze(1)
            scores = attention.scale_scores(queries @ keys.mT, far)
            scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
            out = self.normalize(scores) @ values
        out = out.unflatten(2, (group, rows)).unflatten(0, (-1, n))  # b n kv g rows d
        return out.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :, :time]

    def normalize(
        self, scores: Float[Tensor, "batch kv ... queries keys"]
    ) -> Float[Tensor, "batch kv ... queries keys"]:
        """Weights of the keys from their logits; `queries` are by head, then by token."""
        return scores.softmax(-1) if self.sinks is None else self.share_with_sinks(scores)

    def share_with_sinks(
        self, scores: Float[Tensor, "batch kv ... queries keys"]
    ) -> Float[Tensor, "batch kv ... queries keys"]:
        """Weights of the keys beside a learned sink, in float32 as in GraniteSWA's class."""
        assert self.sinks is not None
        sink = spread_heads(self.sinks, scores).expand(*scores.shape[:-1], 1)
        weight = torch.cat((scores.float(), sink), -1).softmax(-1)
        return weight[..., :-1].to(scores.dtype)

    def collect_sinks(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time value"],
        position: Int[Tensor, "batch time"],
        ids: Int[Tensor, "batch time"],
    ) -> tuple[
        Float[Tensor, "batch kv sinks dim"],
        Float[Tensor, "batch kv sinks value"],
        Int[Tensor, "batch sinks"],
        Int[Tensor, "batch sinks"],
    ]:
        """(keys, values, positions, document numbers) of the sinks of packed documents.

        Those that some query may see; where a row has fewer than another, positions are EMPTY.
        """
        # A sink is needed where its document goes on for a whole window after it.
        size, time = self.options.window, position.shape[1]
        needed = (position > EMPTY) & (position < self.options.sinks)
        needed = needed & F.pad(ids[:, :-size] == ids[:, size:], (0, min(size, time)))

        # A graph has as many as there may be at most: it cannot depend on numbers.
        if torch.compiler.is_compiling():
            count = self.options.sinks * (time // size)
        else:
            count = int(needed.sum(1).max())
        columns = (~needed).long().argsort(dim=1, stable=True)[:, :count]
        at = position.masked_fill(~needed, EMPTY).gather(1, columns)
        return take_tokens(k, columns), take_tokens(v, columns), at, ids.gather(1, columns)

    def keep_last(
        self,
        keys: Float[Tensor, "batch kv total dim"],
        values: Float[Tensor, "batch kv total value"],
        at: Int[Tensor, "batch total"],
        padded: bool,
    ) -> State:
        """The entries of the state for the last `window` tokens of these."""
        size = self.options.window
        if padded:
            # A stable sort moves padding to the front, whatever side it was on.
            last = (at > EMPTY).long().argsort(dim=1, stable=True)[:, -size:]
            keys, values = take_tokens(keys, last), take_tokens(values, last)
            at = at.gather(1, last)
        return {
            "window_k": keys[:, :, -size:],
            "window_v": values[:, :, -size:],
            "window_at": at[:, -size:],
        }

    def keep_sinks(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time value"],
        position: Int[Tensor, "batch time"],
        state: State,
    ) -> State:
        """The entries of the state for the first `sinks` tokens; slot i holds position i."""
        if not self.options.sinks:
            return {part: state[part] for part in ("sink_k", "sink_v", "sink_at")}

        slots = torch.arange(self.options.sinks, device=k.device)
        hit = position.unsqueeze(1) == slots.view(1, -1, 1)  # (batch, sinks, time)
        found, column = hit.any(-1), hit.int().argmax(-1)
        new = {"sink_at": torch.where(found, slots, state["sink_at"])}
        for part, tokens in (("sink_k", k), ("sink_v", v)):
            first = take_tokens(tokens, column)
            new[part] = torch.where(found[:, None, :, None], first, state[part])
        return new


def write_slot(state: State, k: Tensor, v: Tensor, position: Tensor, size: int) -> State:
    """The state with a token in the place of the window's oldest, written in place.

    Args:
        state: as of `Window`.
        k, v, position: of the token, in all rows behind the sinks.
        size: slots of the window.
    """
    slot = state["at"][:, :size].argmin(1, keepdim=True)
    index = slot[:, None, :, None]
    state["k"].scatter_(2, index.expand_as(k), k.to(state["k"].dtype))
    state["v"].scatter_(2, index.expand_as(v), v.to(state["v"].dtype))
    state["at"].scatter_(1, slot, position)
    return state | {"seen": state["seen"] + 1}


def fill_slots(state: State, k: Tensor, v: Tensor, position: Tensor, size: int) -> State:
    """A new state, for any token and padding; arguments as of `write_slot`."""
    slots = torch.arange(state["at"].shape[1], device=k.device)
    # Empty slots are the oldest.
    slot, counts = state["at"][:, :size].argmin(1, keepdim=True), position > EMPTY
    taken = ((slots == slot) | (slots - size == position)) & counts
    index = taken[:, None, :, None]
    return {
        "k": torch.where(index, k, state["k"]),
        "v": torch.where(index, v, state["v"]),
        "at": torch.where(taken, position, state["at"]),
        "seen": state["seen"] + counts,
    }


def _pair_blocks(x: Tensor, n: int, *more: Tensor) -> Tensor:
    """Blocks of `x` (batch, tokens) or (batch, kv, tokens, dim), each behind the one before.

    (batch, n, keys) or (batch, n, kv, keys, dim) from n + 1 blocks; all of `x` for n = 1.

    Args:
        more: what stands behind each of them.
    """
    if n == 1:
        return torch.cat((x.unsqueeze(1), *more), -2) if more else x.unsqueeze(1)
    if x.ndim == 2:
        blocks = x.unflatten(1, (n + 1, -1))
        return torch.cat((blocks[:, :-1], blocks[:, 1:]), 2)
    blocks = x.unflatten(2, (n + 1, -1)).transpose(1, 2)
    return torch.cat((blocks[:, :-1], blocks[:, 1:], *more), 3)


def _pad_ids(x: Int[Tensor, "batch time"], multiple: int) -> Int[Tensor, "batch padded"]:
    """Pad axis 1 (time) with EMPTY at the end to a multiple of `multiple`."""
    short = -x.shape[1] % multiple
    return F.pad(x, (0, short), value=EMPTY) if short else x
