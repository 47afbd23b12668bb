"""Sliding-window softmax attention with sink tokens: the source's own attention, seen through a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attention, Mixer, MixerContext, Projections, State, apply_rotary, pad_time

EMPTY = -1


@dataclass(frozen=True)
class WindowOptions:
    """A token sees the last `window` tokens, itself included, and the first `sinks` tokens of its document."""

    window: int = 64
    sinks: int = 4


def naive_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    sinks: int,
    position: Tensor,
    segments: Tensor,
) -> Tensor:
    """Masked softmax attention; q: (b, heads, t, d), k, v: (b, kv, t, d), position, segments: (b, t) -> (b, heads, t,
    d).

    `position` counts tokens within a document, EMPTY on padding. Source: arXiv 2309.17453 (attention sinks).
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = position.unsqueeze(-1) - position.unsqueeze(-2)
    seen = (distance >= 0) & ((distance < window) | (position.unsqueeze(-2) < sinks))
    seen &= (segments.unsqueeze(-1) == segments.unsqueeze(-2)) & (position.unsqueeze(-2) > EMPTY)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(
        ~seen.unsqueeze(1), torch.finfo(q.dtype).min
    )
    return scores.softmax(-1) @ v


class Window(Mixer):
    """Sliding window with attention sinks (StreamingLLM, Xiao et al., arXiv 2309.17453), positions as in the source.

    Blocks of `window` queries see two blocks of keys and the sinks, so cost is linear in length. The state is the last
    `window` keys and values and the sinks, allocated once.
    """

    name = "window"
    Options = WindowOptions
    expand = False

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.qkv = Projections(attention, expand=False)

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Keys, values and positions of the window and the sinks."""
        options = cls.parse(spec)
        return (options.window + options.sinks) * (2 * attention.kv * attention.dim + 1) + 1

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Scores and weighted sum over window and sinks."""
        options = cls.parse(spec)
        return 4 * attention.heads * attention.dim * (options.window + options.sinks)

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """Blocks of queries against two blocks of keys and the sinks that some token sees from beyond its window."""
        options = cls.parse(spec)
        sinks = min(options.sinks, max(0, length - options.window))
        queries = -(-length // options.window) * options.window
        once = 4 * attention.heads * attention.dim * queries * (2 * options.window + sinks)
        return once, 2 * once

    def initial_state(self, like: Tensor) -> State:
        """The state before the first token; like: (batch, kv, time, dim)."""
        b, kv, _, d = like.shape
        state = {"seen": torch.zeros(b, 1, dtype=torch.long, device=like.device)}
        for part, size in (("window", self.options.window), ("sink", self.options.sinks)):
            state[f"{part}_k"] = like.new_zeros(b, kv, size, d)
            state[f"{part}_v"] = like.new_zeros(b, kv, size, d)
            state[f"{part}_at"] = torch.full((b, size), EMPTY, dtype=torch.long, device=like.device)
        return state

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim) and the state."""
        q, k, v = self.qkv(x)
        q, k = apply_rotary(q, mixing.rotary), apply_rotary(k, mixing.rotary)
        state = state or self.initial_state(k)
        position = self.positions(x, mixing) + state["seen"]
        if mixing.valid is not None:
            position = position.masked_fill(~mixing.valid, EMPTY)
        attend = self.attend_token if x.shape[1] == 1 else self.attend_blocks
        heads = attend(q, k, v, position, mixing.segments, state)
        return heads.transpose(1, 2), self.update_state(k, v, position, state, mixing)

    def positions(self, x: Tensor, mixing: MixerContext) -> Tensor:
        """Tokens before this one in its document, not counting the state's; (batch, time)."""
        b, t = x.shape[:2]
        if mixing.valid is not None:
            count = mixing.valid.long().cumsum(1) - 1
        else:
            count = torch.arange(t, device=x.device).expand(b, t)
        if mixing.segments is None:
            return count
        first = torch.ones(b, t, dtype=torch.bool, device=x.device)
        first[:, 1:] = mixing.segments[:, 1:] != mixing.segments[:, :-1]
        return count - count.masked_fill(~first, 0).cummax(1).values

    def attend_token(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        segments: Tensor | None,
        state: State,
    ) -> Tensor:
        """One token against the state and itself; q: (b, heads, 1, d) -> (b, heads, 1, d)."""
        keys = torch.cat((state["sink_k"], state["window_k"], k), dim=2)
        values = torch.cat((state["sink_v"], state["window_v"], v), dim=2)
        at = torch.cat((state["sink_at"], state["window_at"], position), dim=1)
        distance = position - at
        in_window = torch.arange(at.shape[1], device=q.device) >= state["sink_at"].shape[1]
        # a sink still inside the window is counted there
        seen = (at > EMPTY) & torch.where(
            in_window, distance < self.options.window, distance >= self.options.window
        )
        group = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b, kv, group, d)
        scores = (group @ keys.transpose(-1, -2)) * self.attention.scale
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ values).flatten(1, 2).unsqueeze(2)

    def attend_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        segments: Tensor | None,
        state: State,
    ) -> Tensor:
        """Many tokens in blocks of the window; q: (b, heads, t, d), k, v: (b, kv, t, d) -> (b, heads, t, d)."""
        size, time, kv = self.options.window, q.shape[2], k.shape[1]
        n = -(-time // size)
        ids = (
            position.clamp(max=0)
            if segments is None
            else segments.masked_fill(position == EMPTY, EMPTY)
        )
        past_ids = state["window_at"].clamp(max=0)
        all_at, all_ids = (
            torch.cat((state["window_at"], position), 1),
            torch.cat((past_ids, ids), 1),
        )
        keys, values = torch.cat((state["window_k"], k), 2), torch.cat((state["window_v"], v), 2)
        pair = lambda x, dim: torch.cat((x.narrow(dim, 0, n), x.narrow(dim, 1, n)), dim + 1)  # noqa: E731
        k2, v2 = (pair(pad_time(x, size).unflatten(2, (n + 1, size)), 2) for x in (keys, values))
        at2, ids2 = (
            pair(_pad_ids(x, size).unflatten(1, (n + 1, size)), 1) for x in (all_at, all_ids)
        )
        at, own = (_pad_ids(x, size).unflatten(1, (n, size)) for x in (position, ids))
        distance = at.unsqueeze(-1) - at2.unsqueeze(-2)
        near = (distance >= 0) & (distance < size) & (own.unsqueeze(-1) == ids2.unsqueeze(-2))
        near = near & (at2.unsqueeze(-2) > EMPTY)
        group = (
            pad_time(q, size).unflatten(1, (kv, -1)).unflatten(3, (n, size)).transpose(2, 3)
        )  # b kv n g size d
        scores = [
            self.scale_and_mask(group.flatten(3, 4) @ k2.transpose(-1, -2), near, group.shape[3])
        ]
        sink_k, sink_v, far = self.select_sinks(k, v, position, ids, state, at, own)
        if sink_k.shape[2]:
            sink_scores = group.flatten(3, 4) @ sink_k.unsqueeze(2).transpose(-1, -2)
            scores.append(self.scale_and_mask(sink_scores, far, group.shape[3]))
        weight = torch.cat(scores, dim=-1).softmax(-1)
        out = weight[..., : 2 * size] @ v2
        if sink_k.shape[2]:
            out = out + weight[..., 2 * size :] @ sink_v.unsqueeze(2)
        out = out.unflatten(3, group.shape[3:5]).transpose(2, 3).flatten(3, 4)  # b kv g time d
        return out.flatten(1, 2)[:, :, :time]

    def scale_and_mask(self, scores: Tensor, seen: Tensor, group: int) -> Tensor:
        """Scale and mask; scores: (b, kv, n, group * size, keys), seen: (b, n, size, keys)."""
        seen = seen.unsqueeze(1).repeat(1, 1, 1, group, 1)
        return (scores * self.attention.scale).masked_fill(~seen, torch.finfo(scores.dtype).min)

    def select_sinks(
        self,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        ids: Tensor,
        state: State,
        at: Tensor,
        own: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks that some query sees beyond its window: keys, values (b, kv, m, d) and mask (b, n, size, m)."""
        size = self.options.window
        sink = (position > EMPTY) & (position < self.options.sinks)
        reached = torch.zeros_like(sink)
        if position.shape[1] > size:
            reached[:, :-size] = ids[:, :-size] == ids[:, size:]
        columns = (sink & reached).any(0).nonzero().squeeze(1)
        keys = torch.cat((state["sink_k"], k[:, :, columns]), 2)
        values = torch.cat((state["sink_v"], v[:, :, columns]), 2)
        sink_at = torch.cat(
            (state["sink_at"], position[:, columns].masked_fill(~sink[:, columns], EMPTY)), 1
        )
        sink_ids = torch.cat((state["sink_at"].clamp(max=0), ids[:, columns]), 1)
        some = (sink_at > EMPTY).any(0).nonzero().squeeze(1)
        keys, values, sink_at, sink_ids = (
            keys[:, :, some],
            values[:, :, some],
            sink_at[:, some],
            sink_ids[:, some],
        )
        distance = at.unsqueeze(-1) - sink_at[:, None, None]
        far = (
            (distance >= size)
            & (sink_at > EMPTY)[:, None, None]
            & (own.unsqueeze(-1) == sink_ids[:, None, None])
        )
        return keys, values, far

    def update_state(
        self, k: Tensor, v: Tensor, position: Tensor, state: State, mixing: MixerContext
    ) -> State:
        """The state after these tokens: last `window` of past and new, sinks where they fit."""
        if mixing.segments is not None:
            return state  # packed rows are whole documents: nothing follows them
        size, sinks = self.options.window, self.options.sinks
        new = {"seen": state["seen"] + (position > EMPTY).sum(1, keepdim=True)}
        joined = {
            part: torch.cat((state[part], fresh), 2)
            for part, fresh in (("window_k", k), ("window_v", v))
        }
        at = torch.cat((state["window_at"], position), 1)
        if mixing.valid is None:
            new |= {part: tensor[:, :, -size:] for part, tensor in joined.items()} | {
                "window_at": at[:, -size:]
            }
        else:  # padding goes to the front, whatever side it was on
            last = (at > EMPTY).long().argsort(dim=1, stable=True)[:, -size:]
            index = last[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            new |= {part: tensor.gather(2, index) for part, tensor in joined.items()}
            new["window_at"] = at.gather(1, last)
        new |= {part: state[part] for part in ("sink_k", "sink_v", "sink_at")}
        slots = torch.arange(sinks, device=k.device)
        if sinks and bool((state["seen"] < sinks).any()):
            hit = position.unsqueeze(1) == slots.view(1, -1, 1)  # (b, sinks, t)
            found, where = hit.any(-1), hit.float().argmax(-1)
            index = where[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            for part, fresh in (("sink_k", k), ("sink_v", v)):
                new[part] = torch.where(
                    found[:, None, :, None], fresh.gather(2, index), state[part]
                )
            new["sink_at"] = torch.where(found, slots.expand_as(found), state["sink_at"])
        return new


def _pad_ids(x: Tensor, multiple: int) -> Tensor:
    short = -x.shape[1] % multiple
    return F.pad(x, (0, short), value=EMPTY) if short else x
