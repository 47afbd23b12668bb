"""LoLCATs: softmax attention over a window, linear attention before it, one denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Bool, Float, Int
from .attention import Attention, spread_heads
from .base import MixerContext, State
from .hedgehog import Hedgehog, HedgehogOptions
from .tensors import keep_finite, pad_time, take_tokens
from .weight_spec import WeightSpec
from .window import SINKS


@dataclass(frozen=True)
class LolcatsOptions(HedgehogOptions):
    """As `HedgehogOptions`, and the window."""

    window: int = 64  # tokens under softmax attention, the newest included
    start: float | int = -2.1972  # the window's factor begins at its sigmoid, 0.1 as in the recipes
    affine: bool = False  # whether the factor of the linear terms is one minus the window's


@dataclass(frozen=True)
class WindowedTokens:
    """The window of tokens before a call and the call's own, `window + time` in all."""

    q: Float[Tensor, "batch heads total dim"]  # zeros in the window, whose outputs are out already
    k: Float[Tensor, "batch states total dim"]
    v: Float[Tensor, "batch states total value"]
    filled: Bool[Tensor, "batch total"]  # False on padding and on slots that no token fills
    ids: Int[Tensor, "batch total"]  # document number
    order: (
        Int[Tensor, "batch total"] | None
    )  # how padding was sorted to the front; None: not at all


class Lolcats(Hedgehog):
    """LoLCATs (Zhang et al., arXiv 2410.10254, eq. 6).

    Hedgehog features outside a sliding window, softmax terms inside it: o_n = (gamma sum_{n-w<i<=n}
    e^(q_n k_i / sqrt(dim) - c_n) v_i + phi(q_n)^T sum_{i<=n-w} phi(k_i) v_i^T) / (the same sums
    without v), where c_n is the largest exponent in the window and gamma = sigmoid of a number per
    head. The state is the window (`k`, `v`, `filled`) and `matrix`, the sums over what left it.
    """

    name = "lolcats"
    Options = LolcatsOptions

    # Logit of each head's sink, (heads,); None: the source has none.
    sinks: nn.Parameter | None

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.factor = nn.Parameter(torch.zeros(attention.heads))
        sinks = nn.Parameter(torch.zeros(attention.heads)) if attention.sinks else None
        self.register_parameter("sinks", sinks)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Hedgehog's, the window's factor, and the source's sinks where it has them."""
        factor = WeightSpec("-> kv group", fresh=f"constant {cls.parse(spec).start}", decay=False)
        own = {"factor": factor}
        if attention.sinks:
            own["sinks"] = WeightSpec("-> kv group", SINKS, decay=False)
        return super().weights(attention, spec, output) | own

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Hedgehog's; keys, values and whether there is a token, for the window."""
        options = cls.parse(spec)
        widths = attention.dim + attention.value_dim
        per_token = cls.state_heads(attention, options) * widths + 1
        return super().state_size(attention, spec) + options.window * per_token

    @classmethod
    def softmax_tokens(cls, spec: dict[str, Any]) -> int:
        """The window, where projections, rotation and outputs are the source's."""
        options = cls.parse(spec)
        plain = options.rotary and (options.norm, options.gate) == ("none", "none")
        return options.window if plain and spec.get("inherit", "all") == "all" else 0

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
        forward, backward = super().row_flops(attention, spec, length)
        window = cls.parse(spec).window
        size = min(window, length)
        pairs = attention.heads * -(-length // size) * size * (window + size)
        softmax = 2 * pairs * (attention.dim + cls.value_dim(attention))
        return forward + softmax, backward + 2 * softmax

    def initial_state(self, like: Float[Tensor, "batch states time dim"]) -> State:
        """The state before the first token, with the type and place of the keys `like`."""
        b, heads, _, dim = like.shape
        value = self.attention.value_dim
        keys, values = (
            like.new_zeros(b, heads, self.options.window, width) for width in (dim, value)
        )
        matrix = like.new_zeros(b, heads, self.key_dim(self.attention, self.options), value + 1)
        filled = torch.zeros(b, self.options.window, dtype=torch.bool, device=like.device)
        return {"k": keys, "v": values, "filled": filled, "matrix": matrix}

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head and the state after the last token; see `Mixer.mix`."""
        q, k, v = (t.float() for t in self.rotated_qkv(x, mixing))
        state, window, time = state or self.initial_state(k), self.options.window, x.shape[1]
        tokens = self.join_window(q, k, v, mixing, state)
        q, k, v = tokens.q[:, :, window:], tokens.k, tokens.v
        filled, ids = tokens.filled, tokens.ids

        # Linear attention over what leaves the window. At each step one token does, the one that
        # stands `window` places earlier; one of another document counts as padding.
        query_ids = ids[:, window:]
        left = filled[:, :time] & (ids[:, :time] == query_ids)
        past = MixerContext(None, left, None if mixing.segments is None else query_ids)
        features = self.featurize(q, k[:, :, :time], v[:, :, :time])
        # A key that leaves the window has fallen by ALiBi over its width already.
        features["k"] = features["k"] * (window * features["g"][:, :, :1]).exp().unsqueeze(-1)
        before, matrix = self.run_recurrence(features, past, state["matrix"])

        # Numerators and denominators of both kinds are added; the division comes last.
        gamma = self.factor.float().sigmoid().view(-1, 1)
        inside = self.window_softmax_sums(q, k, v, filled, ids)
        out = gamma * inside + (1 - gamma if self.options.affine else 1.0) * before

        if tokens.order is not None:
            place = (tokens.order.argsort(1)[:, window:] - window).clamp(min=0)  # below 0: padding
            out = out.gather(1, place[:, :, None, None].expand_as(out))
        last = {
            "k": k[:, :, time:],
            "v": v[:, :, time:],
            "filled": filled[:, time:],
            "matrix": matrix,
        }
        return keep_finite(self.normalize_and_gate(out, x), x.dtype), last

    def join_window(
        self,
        q: Float[Tensor, "batch heads time dim"],
        k: Float[Tensor, "batch states time dim"],
        v: Float[Tensor, "batch states time value"],
        mixing: MixerContext,
        state: State,
    ) -> WindowedTokens:
        """The window in `state` and these tokens behind it, padding sorted to the front."""
        window = self.options.window
        valid = mixing.valid
        if valid is None:
            valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool)
        filled = torch.cat((state["filled"], valid), 1)

        # Without packed documents all tokens are of document 0, the window included.
        ids = torch.zeros_like(filled, dtype=torch.long)
        if mixing.segments is not None:
            ids = F.pad(mixing.segments, (window, 0), value=-1)

        q = F.pad(q, (0, 0, window, 0))
        k, v = torch.cat((state["k"], k), 2), torch.cat((state["v"], v), 2)
        if mixing.valid is None:
            return WindowedTokens(q, k, v, filled, ids, None)

        # Padding goes to the front, so that `window` places are `window` tokens.
        order = filled.long().argsort(dim=1, stable=True)
        filled, ids = filled.gather(1, order), ids.gather(1, order)
        q, k, v = (take_tokens(t, order) for t in (q, k, v))
        return WindowedTokens(q, k, v, filled, ids, order)

    def window_softmax_sums(
        self,
        q: Float[Tensor, "batch heads time dim"],
        k: Float[Tensor, "batch states total dim"],
        v: Float[Tensor, "batch states total value"],
        filled: Bool[Tensor, "batch total"],
        ids: Int[Tensor, "batch total"],
    ) -> Float[Tensor, "batch time heads value+1"]:
        """Sums of the window's softmax terms times values, and in the last column times one.

        Args:
            q: queries of the new tokens.
            k, v, filled, ids: the window before them and the new tokens, as in `WindowedTokens`;
                `total` is window + time.
        """
        # Blocks of `size` queries; each sees the window before it and itself.
        window, time, states = self.options.window, q.shape[2], k.shape[1]
        size = min(window, time)
        n = -(-time // size)
        missing = n * size - time
        k = F.pad(k, (0, 0, 0, missing))
        v = F.pad(F.pad(v, (0, 1), value=1.0), (0, 0, 0, missing))
        # keys and values of a block: (batch, states, n, dim, window + size)
        keys, values = (t.unfold(2, window + size, size) for t in (k, v))

        seen = self.window_mask(filled, ids, size, n)
        group = pad_time(q, size).unflatten(1, (states, -1)).unflatten(3, (n, size)).transpose(2, 3)
        seen = seen[:, None, :, None].expand(-1, states, -1, group.shape[3], -1, -1).flatten(3, 4)

        # Keys of a block begin a window before its queries.
        places = torch.arange(window + size, device=k.device)
        distance = (places[window:, None] - places).repeat(group.shape[3], 1)[None, None, None]
        scores = self.attention.scale_scores(group.flatten(3, 4) @ keys, distance)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        largest = scores.amax(-1, keepdim=True)
        if self.sinks is not None:
            sink = spread_heads(self.sinks, scores).expand_as(largest)
            largest = largest.maximum(sink)
        out = (scores - largest).exp() @ values.mT
        if self.sinks is not None:  # a sink takes weight and has no value
            out = torch.cat((out[..., :-1], out[..., -1:] + (sink - largest).exp()), -1)
        out = out.unflatten(3, group.shape[3:5]).transpose(2, 3).flatten(3, 4)  # b states g t dim+1
        return out.flatten(1, 2)[:, :, :time].transpose(1, 2)

    def window_mask(
        self,
        filled: Bool[Tensor, "batch total"],
        ids: Int[Tensor, "batch total"],
        size: int,
        n: int,
    ) -> Bool[Tensor, "batch {n} {size} keys"]:
        """Whether each query of a block sees each of its `window + size` keys."""
        window = self.options.window
        missing = n * size - (ids.shape[1] - window)
        query_ids = F.pad(ids[:, window:], (0, missing)).unflatten(1, (n, size))
        filled, key_ids = (
            F.pad(t, (0, missing)).unfold(1, window + size, size) for t in (filled, ids)
        )

        # The query in row i stands at key column window + i and sees `window` keys up to itself.
        row = torch.arange(size, device=ids.device).view(-1, 1)
        column = torch.arange(window + size, device=ids.device)
        in_window = (column > row) & (column <= row + window)
        same = query_ids.unsqueeze(3) == key_ids.unsqueeze(2)
        return in_window & filled.unsqueeze(2) & same
