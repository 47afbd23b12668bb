"""Sliding-window softmax attention with sink tokens: the source's own attention under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.shapes import Bool, Float, Int
from .base import Attention, Mixer, MixerContext, State, apply_rotary, pad_time

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
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    # one row per query, one column per key
    distance = position.unsqueeze(-1) - position.unsqueeze(-2)
    seen = (distance >= 0) & ((distance < window) | (position.unsqueeze(-2) < sinks))
    seen &= (segments.unsqueeze(-1) == segments.unsqueeze(-2)) & (position.unsqueeze(-2) > EMPTY)

    scores = attention.scale_scores(q @ k.transpose(-1, -2))
    scores = scores.masked_fill(~seen.unsqueeze(1), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


class Window(Mixer):
    """Sliding window with attention sinks (StreamingLLM, Xiao et al., arXiv 2309.17453).

    Positions are the source's. Blocks of `window` queries see two blocks of keys and the sinks, so
    that cost is linear in length. The state is the last `window` keys and values and the sinks, of
    constant size: `window_k`, `window_v`, `sink_k`, `sink_v` (batch, kv, slots, dim), their
    positions `window_at` and `sink_at` (batch, slots), and `seen` (batch, 1), the tokens so far.
    """

    name = "window"
    Options = WindowOptions
    expand = False

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.add_projections(expand=False)

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Keys, values and positions of the window and the sinks."""
        options = cls.parse(spec)
        return (options.window + options.sinks) * (2 * attention.kv * attention.dim + 1) + 1

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
        sinks = min(options.sinks, max(0, length - options.window))
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
        q, k = apply_rotary(q, mixing.rotary), apply_rotary(k, mixing.rotary)
        state = state or self.initial_state(k)

        position = self.positions(x, mixing) + state["seen"]
        if mixing.valid is not None:
            position = position.masked_fill(~mixing.valid, EMPTY)

        attend = self.attend_token if x.shape[1] == 1 else self.attend_blocks
        heads = attend(q, k, v, position, mixing.segments, state)
        return heads.transpose(1, 2), self.update_state(k, v, position, state, mixing)

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

    def attend_token(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch kv 1 dim"],
        v: Float[Tensor, "batch kv 1 dim"],
        position: Int[Tensor, "batch 1"],
        segments: Int[Tensor, "batch 1"] | None,
        state: State,
    ) -> Float[Tensor, "batch heads 1 dim"]:
        """Outputs of one token, which sees the state and itself."""
        keys = torch.cat((state["sink_k"], state["window_k"], k), dim=2)
        values = torch.cat((state["sink_v"], state["window_v"], v), dim=2)
        at = torch.cat((state["sink_at"], state["window_at"], position), dim=1)

        # A sink that is still inside the window stands there too; it is counted there alone.
        distance = position - at
        in_window = torch.arange(at.shape[1], device=q.device) >= state["sink_at"].shape[1]
        seen = (at > EMPTY) & torch.where(
            in_window, distance < self.options.window, distance >= self.options.window
        )

        group = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, kv, group, d)
        scores = self.attention.scale_scores(group @ keys.transpose(-1, -2))
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ values).flatten(1, 2).unsqueeze(2)

    def attend_blocks(
        self,
        q: Float[Tensor, "batch heads time dim"],
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        segments: Int[Tensor, "batch time"] | None,
        state: State,
    ) -> Float[Tensor, "batch heads time dim"]:
        """Outputs of many tokens, in `n` blocks of `size` = window queries."""
        size, time, kv = self.options.window, q.shape[2], k.shape[1]
        n = -(-time // size)
        if segments is None:
            ids = position.clamp(max=0)  # 0 for tokens, EMPTY for padding
        else:
            ids = segments.masked_fill(position == EMPTY, EMPTY)

        # A query sees back into the block before its own, the first block into the state's window:
        # n + 1 blocks of keys give n pairs.
        past_ids = state["window_at"].clamp(max=0)
        keys, values = torch.cat((state["window_k"], k), 2), torch.cat((state["window_v"], v), 2)
        key_at = torch.cat((state["window_at"], position), 1)
        key_ids = torch.cat((past_ids, ids), 1)
        keys, values = (
            _pair_blocks(pad_time(x, size).unflatten(2, (n + 1, size)), 2) for x in (keys, values)
        )
        key_at, key_ids = (
            _pair_blocks(_pad_ids(x, size).unflatten(1, (n + 1, size)), 1)
            for x in (key_at, key_ids)
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

        sink_k, sink_v, sink_at, sink_ids = self.collect_sinks(k, v, position, ids, state)
        if sink_k.shape[2]:
            distance = query_at.unsqueeze(-1) - sink_at[:, None, None]
            far = (distance >= size) & (sink_at > EMPTY)[:, None, None]
            far = far & (query_ids.unsqueeze(-1) == sink_ids[:, None, None])
            sink_scores = queries @ sink_k.unsqueeze(2).transpose(-1, -2)
            scores.append(self.scale_and_mask(sink_scores, far, group.shape[3]))

        # One softmax over both kinds of keys.
        weight = torch.cat(scores, dim=-1).softmax(-1)
        out = weight[..., : 2 * size] @ values
        if sink_k.shape[2]:
            out = out + weight[..., 2 * size :] @ sink_v.unsqueeze(2)
        out = out.unflatten(3, group.shape[3:5]).transpose(2, 3).flatten(3, 4)  # b kv g time d
        return out.flatten(1, 2)[:, :, :time]

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
        state: State,
    ) -> tuple[
        Float[Tensor, "batch kv sinks dim"],
        Float[Tensor, "batch kv sinks dim"],
        Int[Tensor, "batch sinks"],
        Int[Tensor, "batch sinks"],
    ]:
        """(keys, values, positions, document numbers) of the sinks that some query may see.

        Rows share their columns, since a tensor has no rows of different length: a column that is
        no sink in some row has position EMPTY there.
        """
        # A sink is needed where its document goes on for a whole window after it.
        size = self.options.window
        sink = (position > EMPTY) & (position < self.options.sinks)
        reached = torch.zeros_like(sink)
        if position.shape[1] > size:
            reached[:, :-size] = ids[:, :-size] == ids[:, size:]
        columns = (sink & reached).any(0).nonzero().squeeze(1)

        new_at = position[:, columns].masked_fill(~sink[:, columns], EMPTY)
        keys = torch.cat((state["sink_k"], k[:, :, columns]), 2)
        values = torch.cat((state["sink_v"], v[:, :, columns]), 2)
        sink_at = torch.cat((state["sink_at"], new_at), 1)
        sink_ids = torch.cat((state["sink_at"].clamp(max=0), ids[:, columns]), 1)

        used = (sink_at > EMPTY).any(0).nonzero().squeeze(1)
        return keys[:, :, used], values[:, :, used], sink_at[:, used], sink_ids[:, used]

    def update_state(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        state: State,
        mixing: MixerContext,
    ) -> State:
        """The state after these tokens: the last `window` of old and new, sinks where they fit."""
        if mixing.segments is not None:
            return state  # packed rows are whole documents: nothing follows them

        seen = state["seen"] + (position > EMPTY).sum(1, keepdim=True)
        padded = mixing.valid is not None
        window = self._update_window(k, v, position, state, padded)
        return {"seen": seen} | window | self._update_sinks(k, v, position, state)

    def _update_window(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        state: State,
        padded: bool,
    ) -> State:
        """Keys, values and positions of the last `window` tokens."""
        size = self.options.window
        keys, values = torch.cat((state["window_k"], k), 2), torch.cat((state["window_v"], v), 2)
        at = torch.cat((state["window_at"], position), 1)
        if not padded:
            return {
                "window_k": keys[:, :, -size:],
                "window_v": values[:, :, -size:],
                "window_at": at[:, -size:],
            }

        # A stable sort moves padding to the front, whatever side it was on.
        last = (at > EMPTY).long().argsort(dim=1, stable=True)[:, -size:]
        index = last[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return {
            "window_k": keys.gather(2, index),
            "window_v": values.gather(2, index),
            "window_at": at.gather(1, last),
        }

    def _update_sinks(
        self,
        k: Float[Tensor, "batch kv time dim"],
        v: Float[Tensor, "batch kv time dim"],
        position: Int[Tensor, "batch time"],
        state: State,
    ) -> State:
        """Keys, values and positions of the first `sinks` tokens; slot i holds position i."""
        sinks = self.options.sinks
        new = {part: state[part] for part in ("sink_k", "sink_v", "sink_at")}
        if not sinks or not bool((state["seen"] < sinks).any()):
            return new

        slots = torch.arange(sinks, device=k.device)
        hit = position.unsqueeze(1) == slots.view(1, -1, 1)  # (batch, sinks, time)
        found, column = hit.any(-1), hit.float().argmax(-1)
        index = column[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        for part, tokens in (("sink_k", k), ("sink_v", v)):
            taken = tokens.gather(2, index)
            new[part] = torch.where(found[:, None, :, None], taken, state[part])
        new["sink_at"] = torch.where(found, slots.expand_as(found), state["sink_at"])
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
