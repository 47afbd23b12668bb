"""Gated DeltaNet on the source's projections, norms and rotary embedding, two gates per head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.shapes import Float
from ..errors import RegraftError
from .attention import Attention
from .base import MixerContext, State
from .decays import start_decays
from .linear import ACTIVATIONS, EPS, LinearAttention, mean_decay
from .ssm import ShortConv
from .tensors import apply_to_both
from .weight_spec import WeightSpec

HALF_LIVES = (8.0, 64.0, 512.0)  # tokens


@dataclass(frozen=True)
class DeltaOptions:
    """Options of Gated DeltaNet."""

    # Rotate queries and keys as the source does.
    rotary: bool = True
    # Of queries, keys and values.
    activation: Literal["none", "silu"] = "none"
    # The query heads of a group share keys, values, gates and state, as in the source; else each
    # head has its own.
    grouped: bool = True
    # RMS norm of each head's output.
    norm: bool = False
    # Multiply the outputs by silu of a new projection of the input.
    gate: bool = False
    # Taps of a convolution of queries, keys and values over the last tokens, started as identity;
    # 0: none.
    conv: int = 0
    # Multiply unit queries by dim^-0.5.
    scale: bool = False
    # The source's biases of projections and norms of queries and keys, where it has them.
    biases: bool = True
    qk_norm: bool = True
    # Whether the write strength has a bias.
    beta_bias: bool = True
    # Epsilon of the output norm: a number, or "source" for the one of the source's norms.
    eps: float | Literal["source"] = EPS
    # Epsilon on the squared length of queries and keys.
    length_eps: float = 0.0


class GatedDeltaNet(LinearAttention):
    """Gated delta rule (Yang et al., arXiv 2412.06464) on unit-length queries and keys.

    g_t = -exp(rate) softplus(W_g x_t + b_g) is the log-decay, beta_t = sigmoid(W_b x_t + b_b) the
    write strength, both per query head. By default there is no convolution, activation or output
    norm: what the teacher lacks does not help in a short distillation (arXiv 2505.03005,
    ablations). The options also give the layer of Qwen3.5, which has all of them
    (`export.targets.qwen3_5`).
    """

    name = "gated_deltanet"
    Options = DeltaOptions
    delta = True
    gain = "dim"

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        options = self.parse(spec)
        super().__init__(source_parts(attention, options), spec, output)
        self.decay = nn.Linear(attention.hidden, self.states)
        self.beta = nn.Linear(attention.hidden, self.states, bias=options.beta_bias)
        self.rate = nn.Parameter(torch.zeros(self.states))
        if options.conv:
            dim, value = attention.dim, attention.value_dim
            channels = (attention.heads, dim), (self.states, dim), (self.states, value)
            self.conv_q, self.conv_k, self.conv_v = (
                ShortConv(shape, options.conv, bias=False) for shape in channels
            )

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options of a spec.

        Raises RegraftError for an unknown option, a wrong type, a number below 0, or a convolution
        without SiLU.
        """
        options = super().parse(spec)
        for name in ("conv", "eps", "length_eps"):
            value = getattr(options, name)
            if value != "source" and value < 0:
                raise RegraftError(f"mixer '{cls.name}': {name} is {value}, give 0 or more")
        if options.conv and options.activation != "silu":
            raise RegraftError(
                f"mixer '{cls.name}': conv is {options.conv}, and a convolution ends in SiLU: give"
                ' "activation": "silu" as well'
            )
        return options

    @property
    def eps(self) -> float:
        """Epsilon of the output norm."""
        return float(self.options.eps)

    @classmethod
    def output_norm_and_gate(cls, options: DeltaOptions) -> tuple[str, str]:
        """RMS norm with gain and SiLU gate, as the options say."""
        return "rms" if options.norm else "none", "silu" if options.gate else "none"

    @property
    def values_are_linear(self) -> bool:  # type: ignore[override]
        """Whether a map of the head's output can act on its values instead."""
        return self.options.activation == "none" and super().values_are_linear

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Gates start constant: half-life about 44 tokens, or ALiBi's; write strength one half."""
        options = cls.parse(spec)
        axes = cls.state_axes(options)
        table = super().weights(source_parts(attention, options), spec, output)
        decay = start_decays(attention, "softplus", "constant -4.0")
        for name, start in (("decay", decay), ("beta", "zeros")):
            table[f"{name}.weight"] = WeightSpec(f"hidden -> {axes}", fresh="zeros", decay=False)
            table[f"{name}.bias"] = WeightSpec(f"-> {axes}", fresh=start, decay=False)
        table["rate"] = WeightSpec(f"-> {axes}", fresh="zeros", decay=False)
        if not options.beta_bias:
            del table["beta.bias"]
        channels_of = "kv group dim", f"{axes} dim", f"{axes} {attention.value_axis}"
        for name, channels in zip("qkv", channels_of, strict=True):
            if options.conv:
                table |= ShortConv.weights(
                    f"conv_{name}", channels, options.conv, "last_tap", bias=False
                )
        return table

    @classmethod
    def conv_channels(cls, attention: Attention, options: DeltaOptions) -> int:
        """Channels that go through the convolution."""
        states = cls.state_heads(attention, options)
        keys_and_values = attention.dim + attention.value_dim
        channels = attention.heads * attention.dim + states * keys_and_values
        return channels if options.conv else 0

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """The matrices, and the last inputs of the convolution."""
        options = cls.parse(spec)
        channels = cls.conv_channels(attention, options)
        return super().state_size(attention, spec) + max(options.conv - 1, 0) * channels

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """The recurrence and the convolution."""
        options = cls.parse(spec)
        taps = 2 * options.conv * cls.conv_channels(attention, options)
        return super().mixing_flops(attention, spec) + taps

    @property
    def half_lives(self) -> Float[Tensor, "candidates states"] | None:
        """Tokens that calibration tries: in the form with a convolution, whose norm hides from the
        outputs how much the past weighs.
        """
        if not self.options.conv:
            return None
        return torch.tensor(HALF_LIVES)[:, None].expand(-1, self.states).to(self.rate.device)

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " states"]) -> None:
        """Half-lives by the decay's bias; rate zero leaves the softplus as the log-decay."""
        # log(expm1(y)) is the inverse of softplus.
        self.decay.bias.copy_((math.log(2) / tokens).expm1().log())
        self.rate.zero_()

    @property
    def normed_gate(self) -> bool:
        """Whether calibration sets the output gate, which alone says how large outputs are."""
        return bool(self.options.conv and self.options.norm and self.options.gate)

    @torch.no_grad()
    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Half-life = mean distance, write strength from entropy.

        Taylor-Calibrate (arXiv 2606.16429): the log-decay is ln 2 / distance within [1e-3, 5], and
        beta = 0.3 + 0.4 (1 - entropy). Without a bias the strength stays at one half, in the middle
        of that range.
        """
        self.set_half_lives(math.log(2) / mean_decay(distance, self.states))
        if self.options.beta_bias:
            strength = 0.3 + 0.4 * (1 - entropy.view(self.states, -1).mean(1))
            self.beta.bias.copy_(torch.logit(strength))

    def input_layers(self) -> list[nn.Linear]:
        """Queries, keys, values and both gates too."""
        layers = [self.q_proj, self.k_proj, self.v_proj, self.decay, self.beta]
        return layers + super().input_layers()

    def inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> dict[str, Tensor]:
        """Unit queries and keys, values, log-decay and write strength."""
        return self.read_inputs(x, mixing, {})[0]

    def read_inputs(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, past: State
    ) -> tuple[dict[str, Tensor], State]:
        """(`inputs`, states of the convolutions)."""
        (q, k, v), new = self.activate(x, mixing, past)
        if self.options.rotary:
            q, k = self.rotate(q, k, mixing.rotary)
        q, k = apply_to_both(self.unit, q.float(), k.float())
        if self.options.scale:
            q = q * self.attention.dim**-0.5
        decay = F.softplus(mixing.project(self.decay, x).float())
        g = -(self.rate.float().exp() * decay).transpose(1, 2)
        beta = mixing.project(self.beta, x).float().sigmoid().transpose(1, 2)
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta}, new

    def activate(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, past: State
    ) -> tuple[list[Tensor], State]:
        """(queries, keys and values behind convolution and activation, the former's states)."""
        if not self.options.conv:
            act = ACTIVATIONS[self.options.activation]
            return [act(t) for t in self.qkv(x, mixing=mixing)], {}
        found, new = [], {}
        convs = {"conv_q": self.conv_q, "conv_k": self.conv_k, "conv_v": self.conv_v}
        for (name, conv), t in zip(convs.items(), self.qkv(x, mixing=mixing), strict=True):
            y, new[name] = conv(t.transpose(1, 2).flatten(2), mixing, past.get(name))
            found.append(y.unflatten(-1, (t.shape[1], -1)).transpose(1, 2))
        return found, new

    def unit(self, x: Float[Tensor, "batch heads time dim"]) -> Float[Tensor, "... dim"]:
        """`x` at length one."""
        if not self.options.length_eps:
            return F.normalize(x, dim=-1)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.options.length_eps)


def source_parts(attention: Attention, options: DeltaOptions) -> Attention:
    """The attention with what of its biases and norms the options leave."""
    if not options.biases:
        attention = replace(attention, qkv_bias=False, o_bias=False)
    return attention if options.qk_norm else replace(attention, qk_norm=None)
