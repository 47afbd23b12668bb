"""Sliding-window softmax attention with sink tokens: the source's own attention under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Bool, Float, Int
from .attention import Attention
from .base import Mixer, MixerContext, State, WeightSpec, pad_time

SINKS = "attn.sinks.weight"  # role of an attention's learned sinks
EMPTY = -1  # position of padding and of unused slots in the state


@dataclass(frozen=True)
class WindowOptions:
    """What a token sees."""

    window: int = 64  # the last tokens, the token itself included
    sinks: int = 4  # and the first tokens of its document


def naive_window(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch kv time dim"],
    v: Float[Tensor, "batch kv time dim"],
    attention: Attention,
    window: int,
    sinks: int,
    position: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch heads time dim"]:
    """Softmax attention under a mask of all pairs (attention sinks, arXiv 2309.17453).

    Args:
        q, k, v: queries, keys and values, already rotated.
        attention: scales and caps the logits.
        window, sinks: as in `WindowOptions`.
        position: of each token in its document, EMPTY on padding.
        segments: document number of each token.
    """
    scores = naive_scores(q, k, attention, window, sinks, position, segments)
    return scores.softmax(-1) @ v.repeat_interleave(attention.group, 1)


def naive_scores(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch kv time dim"],
    attention: Attention,
    window: int,
    sinks: int,
    position: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch heads time keys"]:
    """Logits of all pairs, the smallest number where a query does not see a key.

    Arguments as of `naive_window`.
    """
    # one row per query, one column per key
    distance = position.unsqueeze(-1) - position.unsqueeze(-2)
    seen = (distance >= 0) & ((distance < window) | (position.unsqueeze(-2) < sinks))
    seen &= (segments.unsqueeze(-1) == segments.unsqueeze(-2)) & (position.unsqueeze(-2) > EMPTY)

    scores = attention.scale_scores(q @ k.repeat_interleave(attention.group, 1).transpose(-1, -2))
    return scores.masked_fill(~seen.unsqueeze(1), torch.finfo(q.dtype).min)


def token_numbers(attention: Attention) -> int:
    """Numbers of state that a token in a window takes: keys, values, position."""
    return 2 * attention.kv * attention.dim + 1


def window_tokens(attention: Attention, numbers: int) -> int:
    """Tokens of window and sinks that a state of so many numbers holds."""
    return (numbers - 1) // token_numbers(attention)


def spread_sinks(
    sinks: Float[Tensor, " heads"], scores: Float[Tensor, "batch kv ... queries keys"]
) -> Float[Tensor, "kv ... queries 1"]:
    """The sink's logit beside the scores of each query; `queries` are by head, then by token."""
    kv, rows = scores.shape[1], scores.shape[-2]
    tokens = rows * kv // len(sinks)  # of each head
    sink = sinks.float().view(kv, -1).repeat_interleave(tokens, 1)
    return sink.view(kv, *[1] * (scores.ndim - 4), rows, 1)


class Window(Mixer):
    """Sliding window with attention sinks (StreamingLLM, Xiao et al., arXiv 2309.17453).

    Positions are the source's. Blocks of `window` queries see two blocks of keys and the sinks, so
    that cost is linear in length. The state is the last `window` keys and values and the sinks, of
    constant size: `window_k`, `window_v`, `sink_k`, `sink_v` (batch, kv, slots, dim), their
    positions `window_at` and `sink_at` (batch, slots), and `seen` (batch, 1), the tokens so far.
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
        return (options.window + options.sinks) * token_numbers(attention) + 1

    @classmethod
    def softmax_tokens(cls, spec: dict[str, Any]) -> int:
        """The window, where all projections are the source's."""
        window: int = cls.parse(spec).window
        return window if spec.get("inherit", "all") == "all" else 0

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Scores and weighted sum over window and sinks."""
        options = cls.parse(spec)
        return 4 * attention.heads * attention.dim * (options.window + options.sinks)

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """Blocks of queries against two blocks of keys and the sinks beyond the window."""
        options = cls.parse(spec)
        sinks = options.sinks if length > options.window else 0
        queries = -(-length // options.window) * options.window
        forward = 4 * attention.heads * attention.dim * queries * (2 * options.window + sinks)
        return forward, 2 * forward

    def initial_state(self, like: Float[Tensor, "batch kv time dim"]) -> State:
        """The state before the first token, with the type and place of the keys `like`."""
        b, kv, _, d = like.shape
        state = {"seen": torch.zeros(b, 1, dtype=torch.long, device=like.device)}
        for part, size in (("window", self.options.window), ("sink", self.options.sinks)):
            state[f"{part}_k"] = like.new_zeros(b, kv, size, d)
            state[f"{part}_v"] = like.new_zeros(b, kv, size, d)
            state[f"{part}_at"] = torch.full((b, size), EMPTY, dtype=torch.long, device=like.device)
        return state

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the state after the last token; see `Mixer.mix`."""
        q, k, v = self.qkv(x)
        q, k = self.rotate(q, k, mixing.rotary)
        begins, state = state is None, state or self.initial_state(k)

        position = self.positions(x, mixing) + state["seen"]
        if mixing.valid is not None:
            position = position.masked_fill(~mixing.valid, EMPTY)

        if x.shape[1] == 1:
            heads, last = self.attend_token(q, k, v, position, state, mixing.valid is not None)
            return heads.transpose(1, 2), state if mixing.segments is not None else last

        keys, values = torch.cat((state["window_k"], k), 2), torch.cat((state["window_v"], v), 2)
        at = torch.cat((state["window_at"], position), 1)
        ids = self.document_ids(position, mixing.segments)
        if mixing.segments is not None:
            sinks = self.collect_sinks(k, v, position, ids)
            return self.attend_blocks(q, keys, values, at, ids, sinks).transpose(1, 2), state

        last = self.keep_last(keys, values, at, mixing.valid is not None)
        last |= self.keep_sinks(k, v, position, state)
        last["seen"] = state["seen"] + (position > EMPTY).sum(1, keepdim=True)
        if begins and x.shape[1] <= self.options.window:
            # All that a query sees is in the window.
            return self.attend_blocks(q, keys, values, at, ids, None).transpose(1, 2), last
        sinks = last["sink_k"], last["sink_v"], last["sink_at"], last["sink_at"].clamp(max=0)
        return self.attend_blocks(q, keys, values, at, ids, sinks).transpose(1, 2), last

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

    def attend_token(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch kv 1 dim"],
        v: Float[Tensor, "batch kv 1 dim"],
        position: Int[Tensor, "batch 1"],
        state: State,
        padded: bool,
    ) -> tuple[Float[Tensor, "batch heads 1 dim"], State]:
        """Outputs of one token, and the state with it; padding leaves the state as it was."""
        size, sinks = self.options.window, self.options.sinks
        slots = torch.arange(sinks, device=q.device)
        counts, is_sink = position > EMPTY, position == slots
        last = {"seen": state["seen"] + counts}

        # The window moves on by one token, whose keys stand behind those of the sinks.
        joined = []
        for part, new, axis in (("k", k, 2), ("v", v, 2), ("at", position, 1)):
            sink, window = state[f"sink_{part}"], state[f"window_{part}"]
            both = torch.cat((sink, window.narrow(axis, 1, size - 1), new), axis)
            moved = both.narrow(axis, sinks, size)
            joined.append(both)
            shape = (-1, 1, 1, 1) if axis == 2 else (-1, 1)
            if padded:
                moved = torch.where(counts.view(shape), moved, window)
            taken = is_sink[:, None, :, None] if axis == 2 else is_sink
            last[f"window_{part}"] = moved
            last[f"sink_{part}"] = torch.where(taken, new, sink) if sinks else sink
        keys, values, at = joined

        # A sink that is still inside the window stands there too; it is counted there alone.
        seen = torch.cat((slots <= position - size, at[:, sinks:] > EMPTY), 1)

        group = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, kv, group, d)
        scores = self.attention.scale_scores(group @ keys.transpose(-1, -2))
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        return (self.normalize(scores) @ values).flatten(1, 2).unsqueeze(2), last

    def attend_blocks(
        self,
        q: Float[Tensor, "batch heads time dim"],
        keys: Float[Tensor, "batch kv total dim"],
        values: Float[Tensor, "batch kv total dim"],
        at: Int[Tensor, "batch total"],
        ids: Int[Tensor, "batch time"],
        sinks: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch heads time dim"]:
        """Outputs of many tokens, in `n` blocks of `size` = window queries.

        Args:
            q: queries.
            keys, values: of the window before these tokens and of these; `total` is window + time.
            at: their positions.
            ids: document number of each of these tokens, EMPTY on padding.
            sinks: keys, values, positions and document numbers; None: no query sees any.
        """
        size, time, kv = self.options.window, q.shape[2], keys.shape[1]
        n = -(-time // size)

        # A query sees back into the block before its own, the first block into the state's window:
        # n + 1 blocks of keys give n pairs.
        position = at[:, size:]
        key_ids = torch.cat((at[:, :size].clamp(max=0), ids), 1)
        keys, values = (
            _pair_blocks(pad_time(x, size).unflatten(2, (n + 1, size)), 2) for x in (keys, values)
        )
        key_at, key_ids = (
            _pair_blocks(_pad_ids(x, size).unflatten(1, (n + 1, size)), 1) for x in (at, key_ids)
        )

        # (batch, n, size, 2 * size): whether a query of a block sees a key of its two.
        query_at, query_ids = (_pad_ids(x, size).unflatten(1, (n, size)) for x in (position, ids))
        distance = query_at.unsqueeze(-1) - key_at.unsqueeze(-2)
        near = (distance >= 0) & (distance < size)
        near = near & (query_ids.unsqueeze(-1) == key_ids.unsqueeze(-2))
        near = near & (key_at.unsqueeze(-2) > EMPTY)

        group = pad_time(q, size).unflatten(1, (kv, -1)).unflatten(3, (n, size)).transpose(2, 3)
        queries = group.flatten(3, 4)  # (batch, kv, n, group * size, dim)
        scores = [self.scale_and_mask(queries @ keys.transpose(-1, -2), near, group.shape[3])]

        if sinks is not None:
            sink_k, sink_v, sink_at, sink_ids = sinks
            distance = query_at.unsqueeze(-1) - sink_at[:, None, None]
            far = (distance >= size) & (sink_at > EMPTY)[:, None, None]
            far = far & (query_ids.unsqueeze(-1) == sink_ids[:, None, None])
            sink_scores = queries @ sink_k.unsqueeze(2).transpose(-1, -2)
            scores.append(self.scale_and_mask(sink_scores, far, group.shape[3]))

        # One softmax over both kinds of keys.
        weight = self.normalize(torch.cat(scores, dim=-1))
        out = weight[..., : 2 * size] @ values
        if sinks is not None:
            out = out + weight[..., 2 * size :] @ sink_v.unsqueeze(2)
        out = out.unflatten(3, group.shape[3:5]).transpose(2, 3).flatten(3, 4)  # b kv g time d
        return out.flatten(1, 2)[:, :, :time]

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
        sink = spread_sinks(self.sinks, scores).expand(*scores.shape[:-1], 1)
        weight = torch.cat((scores.float(), sink), -1).softmax(-1)
        return weight[..., :-1].to(scores.dtype)

    def scale_and_mask(
        self,
        scores: Float[Tensor, "batch kv n queries keys"],
        seen: Bool[Tensor, "batch n size keys"],
        group: int,
    ) -> Float[Tensor, "batch kv n queries keys"]:
        """Logits, the smallest number where a key is not seen; `queries` is group * size."""
        seen = seen.unsqueeze(1).repeat(1, 1, 1, group, 1)
        return self.attention.scale_scores(scores).masked_fill(~seen, torch.finfo(scores.dtype).min)

    def collect_sinks(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        ids: Int[Tensor, "batch time"],
    ) -> tuple[
        Float[Tensor, "batch kv sinks dim"],
        Float[Tensor, "batch kv sinks dim"],
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
        index = columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        at = position.masked_fill(~needed, EMPTY).gather(1, columns)
        return k.gather(2, index), v.gather(2, index), at, ids.gather(1, columns)

    def keep_last(
        self,
        keys: Float[Tensor, "batch kv total dim"],
        values: Float[Tensor, "batch kv total dim"],
        at: Int[Tensor, "batch total"],
        padded: bool,
    ) -> State:
        """The entries of the state for the last `window` tokens of these."""
        size = self.options.window
        if padded:
            # A stable sort moves padding to the front, whatever side it was on.
            last = (at > EMPTY).long().argsort(dim=1, stable=True)[:, -size:]
            index = last[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values, at = keys.gather(2, index), values.gather(2, index), at.gather(1, last)
        return {
            "window_k": keys[:, :, -size:],
            "window_v": values[:, :, -size:],
            "window_at": at[:, -size:],
        }

    def keep_sinks(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        state: State,
    ) -> State:
        """The entries of the state for the first `sinks` tokens; slot i holds position i."""
        if not self.options.sinks:
            return {part: state[part] for part in ("sink_k", "sink_v", "sink_at")}

        slots = torch.arange(self.options.sinks, device=k.device)
        hit = position.unsqueeze(1) == slots.view(1, -1, 1)  # (batch, sinks, time)
        found, column = hit.any(-1), hit.int().argmax(-1)
        index = column[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        new = {"sink_at": torch.where(found, slots, state["sink_at"])}
        for part, tokens in (("sink_k", k), ("sink_v", v)):
            new[part] = torch.where(found[:, None, :, None], tokens.gather(2, index), state[part])
        return new


def _pair_blocks(blocks: Tensor, dim: int) -> Tensor:
    """n + 1 blocks along `dim`, tokens along the next axis -> n blocks, each behind the one before.

    (..., n + 1, size, ...) -> (..., n, 2 * size, ...).
    """
    n = blocks.shape[dim] - 1
    return torch.cat((blocks.narrow(dim, 0, n), blocks.narrow(dim, 1, n)), dim + 1)


def _pad_ids(x: Int[Tensor, "batch time"], multiple: int) -> Int[Tensor, "batch padded"]:
    """Pad axis 1 (time) with EMPTY at the end to a multiple of `multiple`."""
    short = -x.shape[1] % multiple
    return F.pad(x, (0, short), value=EMPTY) if short else x
