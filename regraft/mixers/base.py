"""What every token mixer shares: the attention it replaces, where each weight comes from, projections, context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegraftError
from .options import parse_options

State = dict[str, Tensor]


@dataclass(frozen=True)
class Attention:
    """Shape and conventions of the softmax attention that a mixer replaces.

    Query heads are `kv * group`; query head `h` reads key/value head `h // group`. `scale` multiplies the logits,
    `qk_norm` is the epsilon of a per-head RMS norm on queries and keys (None: there is none), `rotary` says whether
    the host rotates queries and keys.
    """

    hidden: int
    kv: int
    group: int
    dim: int
    scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: float | None = None
    rotary: bool = True

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv * self.group


@dataclass(frozen=True)
class WeightSpec:
    """One parameter of a mixer: its axes and where its value comes from.

    `source` is a role of the source's anatomy; axes of `signature` that the source lacks are broadcast (`group`: each
    key/value head is repeated for its queries). Without a source, `fresh` states the initial value (see `fresh`).
    `decay` says whether weight decay may act on it.
    """

    signature: str
    source: str | None = None
    fresh: str | None = None
    decay: bool = True


@dataclass(frozen=True)
class MixerContext:
    """What a mixer needs to know beside its input.

    `rotary`: cos and sin of shape (batch or 1, time, rotary dims), or None. `valid`: (batch, time) bool, False on
    padding, None when all tokens count. `segments`: (batch, time) document index in a packed row, None for one
    document.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    valid: Tensor | None = None
    segments: Tensor | None = None


def create_initial_tensor(spec: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A float32 tensor of `shape` as stated: zeros, ones, identity, `constant x`, `uniform x` on (-x, x), `normal std`.

    `identity` fills the last two axes with the unit matrix. State-space models: `timesteps a b` is the inverse softplus
    of log-uniform numbers on (a, b), `log_uniform a b` the logarithm of uniform ones, `log_counts` log(1), log(2), ...
    along the last axis. Raises RegraftError on any other word.
    """
    word, *arguments = spec.split()
    values = [float(argument) for argument in arguments]

    def sample_uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    makers: dict[str, Callable[..., Tensor]] = {
        "zeros": lambda: torch.zeros(shape),
        "ones": lambda: torch.ones(shape),
        "identity": lambda: torch.eye(shape[-2], shape[-1]).expand(shape).clone(),
        "constant": lambda value: torch.full(shape, value),
        "uniform": lambda bound: sample_uniform(-bound, bound),
        "normal": lambda std: torch.empty(shape).normal_(0.0, std, generator=generator),
        "timesteps": lambda low, high: (
            sample_uniform(math.log(low), math.log(high)).exp().expm1().log()
        ),
        "log_uniform": lambda low, high: sample_uniform(low, high).log(),
        "log_counts": lambda: torch.arange(1.0, shape[-1] + 1).log().expand(shape).clone(),
    }
    if word not in makers:
        raise RegraftError(f"unknown initial value '{spec}': use one of {', '.join(makers)}")
    return makers[word](*values)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) in the half-split layout; x: (batch, heads, time, dim).

    Only the first `cos.shape[-1]` dimensions turn, the others pass (partial rotary).
    """
    if rotary is None:
        return x
    cos, sin = (table.unsqueeze(1) for table in rotary)
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1).to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm over the last axis with a gain, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: (..., dim)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Projections(nn.Module):
    """Queries, keys and values of the source's attention: biases, QK-norm and rotary embedding as it has them.

    With `expand`, every query head has keys and values of its own (grouped heads are broadcast per head); else keys
    and values keep the source's `kv` heads.
    """

    def __init__(self, attention: Attention, expand: bool):
        super().__init__()
        self.dim = attention.dim
        kv = attention.heads if expand else attention.kv
        bias = attention.qkv_bias
        self.q = nn.Linear(attention.hidden, attention.heads * attention.dim, bias=bias)
        self.k = nn.Linear(attention.hidden, kv * attention.dim, bias=bias)
        self.v = nn.Linear(attention.hidden, kv * attention.dim, bias=bias)
        self.q_norm = (
            HeadNorm(attention.dim, attention.qk_norm) if attention.qk_norm is not None else None
        )
        self.k_norm = (
            HeadNorm(attention.dim, attention.qk_norm) if attention.qk_norm is not None else None
        )

    @staticmethod
    def weights(attention: Attention, expand: bool) -> dict[str, WeightSpec]:
        """Local name -> Weight."""
        wide = "kv group dim" if expand else "kv dim"
        table = {"q.weight": WeightSpec("hidden -> kv group dim", "attn.q.weight")}
        table |= {f"{n}.weight": WeightSpec(f"hidden -> {wide}", f"attn.{n}.weight") for n in "kv"}
        if attention.qkv_bias:
            table["q.bias"] = WeightSpec("-> kv group dim", "attn.q.bias", decay=False)
            table |= {
                f"{n}.bias": WeightSpec(f"-> {wide}", f"attn.{n}.bias", decay=False) for n in "kv"
            }
        if attention.qk_norm is not None:
            table |= {
                f"{n}.weight": WeightSpec("gain dim", f"attn.{n}.weight", decay=False)
                for n in ("q_norm", "k_norm")
            }
        return table

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (batch, time, hidden) -> q, k, v: (batch, heads, time, dim), not yet rotated. `others`: what keys and
        values are made of, x too by default.
        """
        pairs = zip((self.q, self.k, self.v), (x, *(others or (x, x))), strict=True)
        q, k, v = (
            layer(given).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer, given in pairs
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class Mixer(nn.Module):
    """A token mixer for an attention slot: `mix` gives per-head outputs, `forward` projects them back to hidden.

    Subclasses set `name`, an `Options` dataclass, `weights`, `mix`, `state_numbers`, `mixing_flops` and `row_flops`.
    Parallel, chunked and one-token forms agree; the state's size does not depend on how many tokens it has seen.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    expand: ClassVar[bool] = True
    values_are_linear: ClassVar[bool] = False
    denominator: ClassVar[bool] = (
        False  # whether outputs are averages of values, as those of softmax attention are
    )
    qkv: Projections
    o: nn.Linear

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__()
        self.attention = attention
        self.options = self.parse(spec)
        self.inherit: str = spec.get("inherit", "all")
        if output:
            self.o = nn.Linear(
                attention.heads * attention.dim, attention.hidden, bias=attention.o_bias
            )

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options of a spec `{"name": ..., option: value}`; RegraftError on an unknown option or value."""
        return parse_options(
            cls.name,
            cls.Options,
            {key: value for key, value in spec.items() if key not in ("name", "inherit")},
        )

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Local parameter name -> Weight, for the plan and for loading."""
        table = {
            f"qkv.{name}": weight
            for name, weight in Projections.weights(attention, cls.expand).items()
        }
        return table | (output_weights(attention) if output else {})

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Numbers of recurrent state per sequence."""
        raise NotImplementedError

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Forward FLOPs per token beside the parameters' own matrix products, decoding."""
        raise NotImplementedError

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """(forward, backward) FLOPs of a row of `length` tokens, one document, beside the maps applied once a token.

        As `flops.counter` counts the form that `mix` takes for many tokens.
        """
        raise RegraftError(
            f"mixer '{cls.name}' cannot say its FLOPs: give it `row_flops`, or measure a step"
        )

    @property
    def half_lives(self) -> Tensor | None:
        """Those that calibration tries for its states, in tokens, (candidates, states); None: its decays are fixed."""
        return None

    def set_half_lives(self, tokens: Tensor) -> None:
        """Decay so that a state has lost half after `tokens` (states,)."""
        raise RegraftError(
            f"mixer '{self.name}' has no half-lives to set to {tokens.tolist()}: its decays are fixed"
        )

    def start_gates(self, distance: Tensor, entropy: Tensor) -> None:
        """Set gates from the teacher's attention, both (heads,): mean distance looked back over, entropy in [0, 1].

        A mixer without gates has nothing to set.
        """

    @torch.no_grad()
    def fold_heads(self, maps: Tensor) -> bool:
        """Fold a linear map of each head's output, (heads, dim, dim) acting on rows, into the weights; False if it
        cannot.

        Where the heads of a group share their values, `maps` has one map per group.
        """
        heads, dim = self.attention.heads, self.attention.dim
        if self.values_are_linear:
            value = self.qkv.v
            heads = value.weight.shape[0] // dim
            value.weight.copy_((maps.mT @ value.weight.unflatten(0, (heads, dim))).flatten(0, 1))
            if value.bias is not None:
                value.bias.copy_((value.bias.view(heads, 1, dim) @ maps).flatten())
        elif hasattr(self, "o"):
            per_head = self.o.weight.unflatten(1, (heads, dim)).transpose(
                0, 1
            )  # (heads, hidden, dim)
            self.o.weight.copy_((per_head @ maps.mT).transpose(0, 1).flatten(1))
        else:
            return False
        return True

    def matrix(self, x: Tensor, mixing: MixerContext) -> Tensor:
        """How values are mixed over tokens before norms and gates, (batch, heads, time, time); x as in `mix`."""
        raise RegraftError(
            f"mixer '{self.name}' has no single matrix over tokens: leave out the stage 'matrix'"
        )

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> per-head outputs (batch, time, heads, dim) and the state after the last token."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, mixing: MixerContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> y of the same shape and the state after the last token."""
        heads, state = self.mix(x, mixing, state)
        return self.o(heads.flatten(-2)), state


def output_weights(attention: Attention) -> dict[str, WeightSpec]:
    """The output projection of the source."""
    table = {"o.weight": WeightSpec("kv group dim -> hidden", "attn.o.weight")}
    return table | (
        {"o.bias": WeightSpec("-> hidden", "attn.o.bias", decay=False)} if attention.o_bias else {}
    )


def mask_padding(valid: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zero the padded tokens of tensors shaped (batch, heads, time, ...)."""
    if valid is None:
        return tensors
    return tuple(
        t * valid.view(valid.shape[0], 1, -1, *[1] * (t.ndim - 3)).to(t.dtype) for t in tensors
    )


def pad_time(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad axis 2 (time) at the end to a multiple of `multiple`."""
    short = -x.shape[2] % multiple
    return F.pad(x, [0, 0] * (x.ndim - 3) + [0, short]) if short else x
