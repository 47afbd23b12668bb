"""What every token mixer shares.

The attention that it replaces, where each of its weights comes from, the projections of queries,
keys and values, and what it must know about a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.shapes import Bool, Float, Int
from ..errors import RegraftError
from .attention import Attention, HeadNorm, apply_rotary
from .latent import LatentProjections, latent_weights
from .options import parse_options
from .packing import Packed, Projected, pack_linears
from .tensors import apply_to_both, keep_finite
from .weight_spec import WeightSpec

State = dict[str, Tensor]


@dataclass(frozen=True)
class MixerContext:
    """What a mixer needs to know beside its input."""

    # cos and sin of the rotary embedding; None where nothing is rotated.
    rotary: tuple[Float[Tensor, "rows time rotary"], Float[Tensor, "rows time rotary"]] | None = (
        None
    )
    # False on padding; None when every token counts.
    valid: Bool[Tensor, "batch time"] | None = None
    # Document number of every token of a packed row; None for one document per row.
    segments: Int[Tensor, "batch time"] | None = None
    # Whether the state before these tokens may be overwritten: nobody needs it afterwards.
    overwrite: bool = False
    # Outputs of layers of `Mixer.input_layers` that are computed already.
    projected: Projected = field(default_factory=dict)

    def project(
        self, layer: nn.Module, x: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time features"]:
        """What a layer gives for the mixer's input."""
        found = self.projected.get(layer)
        return layer(x) if found is None else found


class Mixer(nn.Module):
    """A token mixer for an attention slot.

    `mix` gives per-head outputs, `forward` projects them back to hidden. Subclasses set `name`, an
    `Options` dataclass, `weights`, `mix`, `state_size`, `mixing_flops` and `row_flops`. The
    parallel, chunked and one-token forms agree; the size of the state does not depend on how many
    tokens it has seen.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    # Whether every query head has keys and values of its own.
    expand: ClassVar[bool] = True
    # Whether the outputs are linear in the values, so that a map can move from one to the other.
    values_are_linear: ClassVar[bool] = False
    # Whether it is a window itself, as wide as `--window` says; no other stands beside it.
    is_window: ClassVar[bool] = False
    # Whether it is made for texts that begin with the BOS token.
    begins_with_bos: ClassVar[bool] = False
    # Whether its decays are the source's ALiBi, or begin as it has them.
    takes_alibi: ClassVar[bool] = True
    # Whether outputs are averages of values, as those of softmax attention are.
    denominator: ClassVar[bool] = False
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    # Latent attention: what stands in the place of these three.
    latent: LatentProjections
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    o_proj: nn.Linear
    o_gate: nn.Linear
    # `input_layers` as one matrix, where `pack` made one.
    packed: Packed | None = None

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__()
        self.attention = attention
        self.options = self.parse(spec)
        self.inherit: str = spec.get("inherit", "all")
        if output:
            width = attention.heads * attention.value_dim
            self.o_proj = nn.Linear(width, attention.hidden, bias=attention.o_bias)
        if output and attention.gated:
            self.o_gate = nn.Linear(attention.hidden, width, bias=attention.qkv_bias)

    def add_projections(self, expand: bool) -> None:
        """Add the projections of `qkv`, with the biases and the QK norm of the source's attention.

        Args:
            expand: whether every query head has keys and values of its own, copies of its group's;
                else keys and values keep the source's `kv` heads.
        """
        attention = self.attention
        hidden, dim, bias = attention.hidden, attention.dim, attention.qkv_bias
        self.states = attention.heads if expand else attention.kv
        self.q_norm = self.k_norm = None
        if attention.latent:
            self.latent = LatentProjections(attention)
            return

        self.q_proj = nn.Linear(hidden, attention.heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.states * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.states * dim, bias=bias)
        if attention.qk_norm is not None:
            together, unit = attention.norms_heads_together, "1+" in attention.qk_norm_form
            counts = (attention.heads, self.states) if together else (1, 1)
            kind = attention.qk_norm_centered, attention.qk_norm_bias
            self.q_norm, self.k_norm = (
                HeadNorm(dim, attention.qk_norm, heads, unit, *kind) for heads in counts
            )

    def qkv(
        self,
        x: Float[Tensor, "batch time hidden"],
        *others: Float[Tensor, "batch time hidden"],
        mixing: MixerContext | None = None,
    ) -> tuple[
        Float[Tensor, "batch heads time features"],
        Float[Tensor, "batch states time features"],
        Float[Tensor, "batch states time dim"],
    ]:
        """Queries, keys and values, not yet rotated; `features` is `dim` but in a merged `t2r`.

        Args:
            x: what queries are made of.
            others: what keys and values are made of, two tensors; x for both when left out. With a
                latent both are made of the first.
            mixing: what is computed of them already.
        """
        if self.attention.latent:
            q, k, v = self.latent(x)
            return q, k, v
        mixing = mixing or MixerContext()
        layers = (self.q_proj, self.k_proj, self.v_proj)
        inputs, heads = (x, *(others or (x, x))), (self.attention.heads, self.states, self.states)
        q, k, v = (
            mixing.project(layer, read).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, read, count in zip(layers, inputs, heads, strict=True)
        )
        if not self.norms_rotated:
            q, k = self.norm_heads(q, k)
        limit = self.attention.clip
        if limit is not None:
            q, k, v = (t.clamp(-limit, limit) for t in (q, k, v))
        return q, k, v

    def input_layers(self) -> list[nn.Linear]:
        """The layers that read a mixer's input as it is, by `MixerContext.project`."""
        return [self.o_gate] if hasattr(self, "o_gate") else []

    def pack(self) -> None:
        """Store the weights that read the input as one matrix, for steps of one token.

        Their values stay the same, and so does what they compute but for rounding.
        """
        self.packed = pack_linears([] if self.attention.latent else self.input_layers())

    def project_token(
        self, x: Float[Tensor, "batch 1 hidden"], mixing: MixerContext
    ) -> MixerContext:
        """The context with what all `input_layers` give, where they are packed."""
        if self.packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return mixing
        if not self.packed.holds():
            self.packed = None  # other weights stand in the layers now
            return mixing
        return replace(mixing, projected=self.packed(x))

    @property
    def norms_rotated(self) -> bool:
        """Whether queries and keys are normed after `rotate`: as in the source, if it rotates."""
        return self.attention.norms_rotated and getattr(self.options, "rotary", True)

    def norm_heads(
        self, q: Float[Tensor, "batch heads time dim"], k: Float[Tensor, "batch states time dim"]
    ) -> tuple[Float[Tensor, "batch heads time dim"], Float[Tensor, "batch states time dim"]]:
        """Queries and keys behind the source's norms, where it has them."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def rotate(
        self,
        q: Float[Tensor, "batch heads time dim"],
        k: Float[Tensor, "batch states time dim"],
        rotary: tuple[Float[Tensor, "rows time rotary"], Float[Tensor, "rows time rotary"]] | None,
    ) -> tuple[Float[Tensor, "batch heads time dim"], Float[Tensor, "batch states time dim"]]:
        """Queries and keys rotated as the source's layer does, and normed where it does so then.

        Args:
            q, k: as `qkv` gives them.
            rotary: cos and sin as the host has them; None where nothing is rotated.
        """
        attention = self.attention
        if rotary is not None and attention.rotary:
            if attention.rotary_tables == "once, sin first":
                rotary = rotary[1], rotary[0]
            if attention.rotary_tables == "neighbours":
                rotary = rotary[0][..., ::2], rotary[1][..., ::2]
            if attention.rotary_tables != "halves":
                rotary = torch.cat((rotary[0],) * 2, -1), torch.cat((rotary[1],) * 2, -1)
            q, k = apply_to_both(lambda x: apply_rotary(x, rotary, attention.rotary_pairs), q, k)
        return self.norm_heads(q, k) if self.norms_rotated else (q, k)

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Any:
        """The options of a spec such as `{"name": "window", "window": 64}`.

        Raises RegraftError on an unknown option or a value of the wrong type.
        """
        options = {key: value for key, value in spec.items() if key not in ("name", "inherit")}
        return parse_options(cls.name, cls.Options, options)

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Local parameter name -> WeightSpec, for the plan and for loading.

        Args:
            attention: what the mixer replaces.
            spec: the mixer's name and options.
            output: whether the mixer has an output projection of its own; a branch beside a
                window has none.
        """
        table = projection_weights(attention, cls.expand)
        return table | (output_weights(attention) if output else {})

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Numbers of recurrent state per sequence."""
        raise NotImplementedError

    @classmethod
    def softmax_tokens(cls, spec: dict[str, Any]) -> int:
        """Tokens of a row on which it computes the source's attention itself; 0: on none.

        As converted, before training. A gated mixer does with its gate shut.
        """
        return 0

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Forward FLOPs per token beside the parameters' own matrix products, decoding."""
        raise NotImplementedError

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """(forward, backward) FLOPs of a row of `length` tokens, one document.

        Without the weights' own matrix products, which `modeling.flops` counts. Counted as
        `modeling.flops.build_flop_counter` counts the form that `mix` takes for many tokens.
        Raises RegraftError for a mixer that does not define it.
        """
        raise RegraftError(
            f"mixer '{cls.name}' cannot say its FLOPs: give it `row_flops`, or measure a step"
        )

    @property
    def half_lives(self) -> Float[Tensor, "candidates states"] | None:
        """Half-lives in tokens that calibration tries; None when decays are fixed."""
        return None

    def set_half_lives(self, tokens: Float[Tensor, " states"]) -> None:
        """Set each state's decay so that it has lost half after `tokens`.

        Raises RegraftError for a mixer whose decays are fixed.
        """
        raise RegraftError(
            f"mixer '{self.name}' has no half-lives to set to {tokens.tolist()}: its decays are "
            "fixed"
        )

    def start_gates(
        self, distance: Float[Tensor, " heads"], entropy: Float[Tensor, " heads"]
    ) -> None:
        """Set gates from measurements of the teacher's attention; does nothing without gates.

        Args:
            distance: mean distance that each head looks back over, in tokens.
            entropy: of each head's attention, in [0, 1].
        """

    def fit_inputs(self, inputs: Float[Tensor, "rows hidden"]) -> None:
        """Set what the layer's inputs alone decide; does nothing by default.

        Args:
            inputs: what the layer got, one row per token.
        """

    def value_rows(
        self,
    ) -> tuple[Float[Tensor, "states dim inputs"], Float[Tensor, "states dim"] | None]:
        """Views of the weight and of the bias that give each head's values."""
        if self.attention.latent:
            return self.latent.value_rows(), None
        weight, bias = self.v_proj.weight, self.v_proj.bias
        heads = self.states, -1
        return weight.unflatten(0, heads), None if bias is None else bias.unflatten(0, heads)

    @torch.no_grad()
    def fold_heads(self, maps: Float[Tensor, "heads dim dim"]) -> bool:
        """Fold a linear map of each head's output into the weights; False if it cannot be done.

        Args:
            maps: acting on rows, one per head, or one per group where the heads of a group share
                their values.
        """
        heads, dim = self.attention.heads, self.attention.value_dim

        # Values are tried first: they may be shared by a group, the output projection never is.
        if self.values_are_linear and self.attention.clip is None:
            weight, bias = self.value_rows()
            weight.copy_(maps.mT @ weight)
            if bias is not None:
                bias.copy_((bias.unsqueeze(1) @ maps).squeeze(1))
        elif hasattr(self, "o_proj") and not hasattr(self, "o_gate"):
            # one block of columns per head, shaped (heads, hidden, dim)
            per_head = self.o_proj.weight.unflatten(1, (heads, dim)).transpose(0, 1)
            self.o_proj.weight.copy_((per_head @ maps.mT).transpose(0, 1).flatten(1))
        else:
            return False
        return True

    def matrix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext
    ) -> Float[Tensor, "batch heads time time"]:
        """How values are mixed over tokens, before norms and gates; x as in `mix`.

        Raises RegraftError for a mixer that is not one matrix over tokens per head.
        """
        raise RegraftError(
            f"mixer '{self.name}' has no single matrix over tokens: leave out the stage 'matrix'"
        )

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head, and the state after the last token.

        Args:
            x: input of the attention slot.
            mixing: rotary tables, padding and documents of these tokens.
            state: the state after the tokens before these; None at the start of a sequence.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "batch time hidden"],
        mixing: MixerContext,
        state: State | None = None,
    ) -> tuple[Float[Tensor, "batch time hidden"] | Float[Tensor, "batch time heads dim"], State]:
        """The slot's output, and the state after the last token; arguments as in `mix`.

        A branch, which has no output projection, gives `mix`'s outputs per head.
        """
        if x.shape[1] == 1:
            mixing = self.project_token(x, mixing)
        heads, state = self.mix(x, mixing, state)
        if not hasattr(self, "o_proj"):
            return heads, state
        if hasattr(self, "o_gate"):
            # The source's own gate (Qwen3-Next), behind whatever mixes its values.
            heads = heads * mixing.project(self.o_gate, x).sigmoid().view_as(heads)
        return keep_finite(self.o_proj(heads.flatten(-2)), x.dtype), state


def projection_weights(attention: Attention, expand: bool) -> dict[str, WeightSpec]:
    """The source's queries, keys and values; `expand` as of `Mixer.add_projections`."""
    if attention.latent:
        return latent_weights(attention)
    # With "group" in the signature, loading repeats each key/value head for its queries.
    axes = {"q": "kv group dim"} | dict.fromkeys("kv", "kv group dim" if expand else "kv dim")
    table: dict[str, WeightSpec] = {}
    for name, wide in axes.items():
        table[f"{name}_proj.weight"] = WeightSpec(f"hidden -> {wide}", f"attn.{name}.weight")
    for name, wide in axes.items() if attention.qkv_bias else ():
        table[f"{name}_proj.bias"] = WeightSpec(f"-> {wide}", f"attn.{name}.bias", decay=False)
    for name, wide in axes.items() if attention.qk_norm is not None else ():
        if name == "v":
            continue
        form = f"gain {wide}" if attention.norms_heads_together else attention.qk_norm_form
        table[f"{name}_norm.weight"] = WeightSpec(form, f"attn.{name}_norm.weight", decay=False)
        if attention.qk_norm_bias:
            table[f"{name}_norm.bias"] = WeightSpec("-> dim", f"attn.{name}_norm.bias", decay=False)
    return table


def output_weights(attention: Attention) -> dict[str, WeightSpec]:
    """The output projection of the source, and its gate on the heads' outputs."""
    heads = f"kv group {attention.value_axis}"
    table = {"o_proj.weight": WeightSpec(f"{heads} -> hidden", "attn.o.weight")}
    if attention.o_bias:
        table["o_proj.bias"] = WeightSpec("-> hidden", "attn.o.bias", decay=False)
    if attention.gated:
        table["o_gate.weight"] = WeightSpec(f"hidden -> {heads}", "attn.gate.weight")
    if attention.gated and attention.qkv_bias:
        table["o_gate.bias"] = WeightSpec(f"-> {heads}", "attn.gate.bias", decay=False)
    return table
