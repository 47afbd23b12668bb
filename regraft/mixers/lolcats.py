"""LoLCATs: softmax attention over a window and linear attention over what came before, under one denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attention, MixerContext, State, WeightSpec, pad_time
from .hedgehog import Hedgehog, HedgehogOptions


@dataclass(frozen=True)
class LolcatsOptions(HedgehogOptions):
    """As `HedgehogOptions`. `window`: tokens under softmax attention, the newest included. `start`: the window's factor
    is its sigmoid at first (the released recipes': 0.1). `affine`: the linear terms' factor is one minus the window's.
    """

    window: int = 64
    start: float | int = -2.1972
    affine: bool = False


class Lolcats(Hedgehog):
    """LoLCATs (Zhang et al., arXiv 2410.10254, eq. 6): Hedgehog features outside a sliding window, softmax terms in it.

    o_n = (gamma sum_{n-w<i<=n} e^(q_n k_i / sqrt(dim) - c_n) v_i + phi(q_n)^T sum_{i<=n-w} phi(k_i) v_i^T) / (the same
    sums without v), where c_n is the largest exponent in the window and gamma = sigmoid of a number per head.
    """

    name = "lolcats"
    Options = LolcatsOptions

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.factor = nn.Parameter(torch.zeros(attention.heads))

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Hedgehog's, and the window's factor."""
        factor = WeightSpec("-> kv group", fresh=f"constant {cls.parse(spec).start}", decay=False)
        return super().weights(attention, spec, output) | {"factor": factor}

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Hedgehog's; keys, values and whether there is a token, for the window."""
        options = cls.parse(spec)
        held = 2 * cls.state_heads(attention, options) * attention.dim + 1
        return super().state_size(attention, spec) + options.window * held

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Hedgehog's; scores and weighted sums over the window."""
        pairs = attention.heads * cls.parse(spec).window
        return super().mixing_flops(attention, spec) + 2 * pairs * (
            attention.dim + cls.value_dim(attention)
        )

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """Hedgehog's; blocks of queries against the keys that one of them sees."""
        once, back = super().row_flops(attention, spec, length)
        window = cls.parse(spec).window
        size = min(window, length)
        pairs = attention.heads * -(-length // size) * size * (window + size)
        softmax = 2 * pairs * (attention.dim + cls.value_dim(attention))
        return once + softmax, back + 2 * softmax

    def initial_state(self, like: Tensor) -> State:
        """The state before the first token; like: (batch, heads, time, dim)."""
        b, heads, _, dim = like.shape
        window = like.new_zeros(b, heads, self.options.window, dim)
        matrix = like.new_zeros(b, heads, self.key_dim(self.attention, self.options), dim + 1)
        held = torch.zeros(b, self.options.window, dtype=torch.bool, device=like.device)
        return {"k": window, "v": window, "held": held, "matrix": matrix}

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim), and the state: window and matrix of what left it."""
        q, k, v = (t.float() for t in self.rotated_qkv(x, mixing))
        state, window, time = state or self.initial_state(k), self.options.window, x.shape[1]
        valid = (
            torch.ones_like(x[..., 0], dtype=torch.bool) if mixing.valid is None else mixing.valid
        )
        held = torch.cat((state["held"], valid), 1)
        ids = torch.zeros_like(held, dtype=torch.long)
        if mixing.segments is not None:
            ids = F.pad(mixing.segments, (window, 0), value=-1)
        q, k, v = (
            F.pad(q, (0, 0, window, 0)),
            torch.cat((state["k"], k), 2),
            torch.cat((state["v"], v), 2),
        )
        if mixing.valid is not None:  # padding goes to the front, so that windows are of tokens
            order = held.long().argsort(dim=1, stable=True)
            held, ids = held.gather(1, order), ids.gather(1, order)
            q, k, v = (
                t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
                for t in (q, k, v)
            )
        q, own = q[:, :, window:], ids[:, window:]
        left = held[:, :time] & (
            ids[:, :time] == own
        )  # these tokens leave the window, one at each step
        past = MixerContext(None, left, None if mixing.segments is None else own)
        before, matrix = self.run_recurrence(
            self.featurize(q, k[:, :, :time], v[:, :, :time]), past, state["matrix"]
        )
        gamma = self.factor.float().sigmoid().view(-1, 1)
        out = (
            gamma * self.window_softmax_sums(q, k, v, held, ids)
            + (1 - gamma if self.options.affine else 1.0) * before
        )
        if mixing.valid is not None:
            back = (order.argsort(1)[:, window:] - window).clamp(min=0)  # below zero: padding
            out = out.gather(1, back[:, :, None, None].expand_as(out))
        last = {"k": k[:, :, time:], "v": v[:, :, time:], "held": held[:, time:], "matrix": matrix}
        return self.normalize_and_gate(out, x).to(x.dtype), last

    def window_softmax_sums(
        self, q: Tensor, k: Tensor, v: Tensor, held: Tensor, ids: Tensor
    ) -> Tensor:
        """Sums of softmax terms, (batch, time, heads, dim + 1), the last over values of one.

        q: (batch, heads, time, dim); k, v: (batch, states, window + time, dim); held, ids: (batch, window + time).
        """
        window, time, states = self.options.window, q.shape[2], k.shape[1]
        size = min(window, time)
        n = -(-time // size)
        more = n * size - time
        k, v = F.pad(k, (0, 0, 0, more)), F.pad(F.pad(v, (0, 1), value=1.0), (0, 0, 0, more))
        keys, values = (
            t.unfold(2, window + size, size) for t in (k, v)
        )  # (b, states, n, dim, window + size)
        held, theirs = (F.pad(t, (0, more)).unfold(1, window + size, size) for t in (held, ids))
        own = F.pad(ids[:, window:], (0, more)).unflatten(1, (n, size))
        at, to = (
            torch.arange(size, device=q.device).view(-1, 1),
            torch.arange(window + size, device=q.device),
        )
        seen = (
            (to > at)
            & (to <= at + window)
            & held.unsqueeze(2)
            & (own.unsqueeze(3) == theirs.unsqueeze(2))
        )
        group = pad_time(q, size).unflatten(1, (states, -1)).unflatten(3, (n, size)).transpose(2, 3)
        seen = seen[:, None, :, None].expand(-1, states, -1, group.shape[3], -1, -1).flatten(3, 4)
        scores = (group.flatten(3, 4) @ keys) * self.attention.scale
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        out = (scores - scores.amax(-1, keepdim=True)).exp() @ values.mT
        return (
            out.unflatten(3, group.shape[3:5])
            .transpose(2, 3)
            .flatten(3, 4)
            .flatten(1, 2)[:, :, :time]
            .transpose(1, 2)
        )
