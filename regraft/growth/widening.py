"""Widening: how every axis of every tensor grows, what its old entries are multiplied by, and what
its new ones begin with (`_choose_written_init`, `_choose_read_init`).

Both follow from a tensor's signature, its role and the streams it stands between. Lemmas L1 to L13
are in docs/concepts/expansions.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.anatomy import Anatomy, Part
from ..core.axes import Axes, Expansion, Signature, identity
from ..core.checkpoint import Checkpoint
from ..core.shapes import Float
from .tensor import AxisGrowth, Init

GROWABLE_AXES = ("hidden", "ffn", "inner", "kv", "group", "dim")
ATTENTIONS = ("attn", "cross_attn")  # in roles: attention, and a decoder's to its encoder
QUERY_KEY_KINDS = ("q", "k", "q_norm", "k_norm")
# How norms over queries and keys take wider heads (L7). Live: new query coordinates hold rotated
# copies and learn. Dead: new coordinates of queries and keys are zero and stay so.
QkNorm = Literal["live", "dead"]
LIVE: QkNorm = "live"
DEAD: QkNorm = "dead"


@dataclass(frozen=True)
class MapSpec:
    """One of the maps that are packed into a tensor, or its only one."""

    role: str  # such as attn.q.weight, also where q, k and v are one tensor
    part: Part  # the tensor
    signature: Signature  # the map's own, over named axes
    output: Axes  # the axes that it writes
    layer: int | None  # None outside the stack of layers

    @property
    def kind(self) -> str:
        """What `kind_of` says of the role."""
        return kind_of(self.role)

    @property
    def axes(self) -> list[str]:
        """Its axes, output first."""
        return tensor_axes(self.signature, self.output)

    @property
    def writes_hidden(self) -> bool:
        """Whether an output is the residual stream."""
        return any("hidden" in output for output in self.signature.outputs)


@dataclass(frozen=True)
class Widening:
    """Everything that decides what the tensors of a wider model hold."""

    source: Checkpoint
    config: Mapping[str, Any]  # of the target
    sizes: Mapping[str, int]  # of the target's axes
    # The expansion of each axis; one that is missing stays. "qk" is that of `dim` for queries and
    # keys, whose coordinates may carry rotary frequencies.
    axes: Mapping[str, Expansion]
    split: int = 1  # into how many heads every key/value head is split first
    # How the mean square that norms see over a padded stream is kept (L2): `stream` multiplies
    # everything that is written, `eps` changes gains and the config's epsilon.
    fold: Literal["stream", "eps"] = "eps"
    # Standard deviation of the noise of readers of copies, relative to the tensor's own.
    noise: float = 0.0
    seed: int = 0
    qk_norm: QkNorm | None = None  # None: queries and keys have no norm

    @property
    def anatomy(self) -> Anatomy:
        """What is grown: a family, or a linearized model."""
        return self.source.anatomy

    @property
    def family(self) -> Anatomy:
        """The family whose norms, positions and constraints count."""
        return self.anatomy.host(self.source.config)

    def expansion(self, axis: str, role: str) -> Expansion:
        """The expansion of an axis for a role: queries and keys have their own for `dim`."""
        name = "qk" if axis == "dim" and kind_of(role) in QUERY_KEY_KINDS else axis
        return self.axes.get(name) or identity(self.source.sizes.get(axis, 1))

    @property
    def hidden_expansion(self) -> Expansion:
        """The expansion of the residual stream."""
        return self.expansion("hidden", "")

    @cached_property
    def has_layer_norm(self) -> bool:
        """Whether norms over the stream subtract the mean."""
        return self.family.bare_norms or any(
            part.subtracts_mean and "hidden" in part.axes.outputs[0] for part in self.parts
        )

    @cached_property
    def has_full_qk_norm(self) -> bool:
        """Whether query and key norms run over all heads at once."""
        return any(
            part.norm and part.axes.kind == "gain" and "kv" in part.axes.outputs[0]
            for part in self.parts
        )

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of the source, each once however many layers have it."""
        placed = self.anatomy.place(self.source.config).values()
        return list({id(one.part): one.part for one in placed}.values())

    @cached_property
    def has_tied_head(self) -> bool:
        """Whether the output embedding is the input embedding."""
        tensors = self.source.tensors
        # Some classes have both whatever the config says.
        has_twin = ("embed.weight", None) in tensors and ("head.weight", None) not in tensors
        return has_twin and bool(
            self.anatomy.fill_defaults(self.source.config).get("tie_word_embeddings")
        )

    @property
    def rms_ratio(self) -> float:
        """Old root mean square of the stream over the new one, old values kept: sqrt(h' / (copies
        h)).
        """
        hidden = self.hidden_expansion
        return math.sqrt(hidden.new / ((hidden.copies or 1) * hidden.old))

    def stream_scale(self, stream: str) -> float:
        """What values in a stream of hidden size are multiplied by."""
        if stream in ("stream", "branch"):
            return self.rms_ratio if self.fold == "stream" else 1.0
        # Without a gain to take it back, what a norm gives is as much larger as its input.
        if self.family.bare_norms and not (stream == "head" and self.has_tied_head):
            return self.rms_ratio

        # A tied head cannot be scaled apart from the embedding: what it reads makes up for the
        # embedding's factor (L12).
        if stream == "head" and self.has_tied_head:
            return self.head_factor / self.embed_factor
        return 1.0

    @property
    def embed_factor(self) -> float:
        """What the stored embedding is multiplied by."""
        # Gemma multiplies embeddings by sqrt(hidden) itself, which grows by sqrt(h' / h) (L11).
        hidden = self.hidden_expansion
        undo = math.sqrt(hidden.old / hidden.new) if self._has(self.family.embed_scale) else 1.0
        return self.stream_scale("stream") * undo

    @property
    def head_factor(self) -> float:
        """What the head's input is multiplied by for a class that divides it by sqrt(hidden)."""
        hidden = self.hidden_expansion
        return math.sqrt(hidden.new / hidden.old) if self._has(self.family.head_scale) else 1.0

    def _has(self, key: bool | str) -> bool:
        """Whether a switch of the table, or the config key that it names, is on."""
        full = self.anatomy.fill_defaults(self.source.config)
        return bool(full.get(key)) if isinstance(key, str) else key

    @property
    def eps(self) -> float | None:
        """The norms' new epsilon, None when it stays (L2, fold `eps`)."""
        old = self.anatomy.fill_defaults(self.source.config).get(self.family.eps)
        if self.fold != "eps" or self.rms_ratio == 1 or old is None:
            return None
        return float(old) / self.rms_ratio**2

    @property
    def head_ratio(self) -> float:
        """sqrt(d' / d) of the head width."""
        return math.sqrt(self.sizes["dim"] / self.source.sizes["dim"])

    def softmax_scale_ratio(self, layer: int) -> float:
        """Old softmax scale over the new one: what keys are multiplied by to make up for it."""
        fill, scale = self.anatomy.fill_defaults, self.family.scale
        before = scale(fill(self.source.config), self.source.sizes["dim"], layer)
        after = scale(fill(self.config), self.sizes["dim"], layer)
        return before / after


def kind_of(role: str) -> str:
    """What kind of tensor a role means: `q` of attn.q.weight, `up` of mlp.3.up.bias."""
    return role.split(".")[-2] if "." in role else role


def tensor_axes(signature: Signature, output: Axes) -> list[str]:
    """The axes of one output of a tensor, output first."""
    return [*output, *signature.inputs]


def weight_factor(widening: Widening, spec: MapSpec) -> float:
    """What the old entries of a tensor are multiplied by, shares of copies aside."""
    signature, part = spec.signature, spec.part
    if spec.role == "embed.weight":
        return widening.embed_factor
    if signature.kind == "scale":
        return 1.0

    # Writers of the stream are multiplied by its scale, readers divided by it; a norm in between
    # makes up for the changed mean square (L2, L3). Its bias is not normed, so it has no such part.
    if part.norm and spec.writes_hidden:
        normed = widening.rms_ratio if signature.kind == "gain" else 1.0
        return widening.stream_scale(part.writes) / normed
    if part.norm:
        return qk_gain(widening, spec.kind, spec.layer or 0)

    value = widening.stream_scale(part.writes) if spec.writes_hidden else 1.0
    if "hidden" in signature.inputs:
        value /= widening.stream_scale(part.reads)
    if spec.kind in ("q", "k") and spec.role.split(".")[-3] in ATTENTIONS:
        value *= attention_factor(widening, spec.kind, spec.layer or 0)
    return value


def attention_factor(widening: Widening, kind: str, layer: int) -> float:
    """What queries (kind `q`) or keys (`k`) are multiplied by when heads get wider.

    Without a norm on them the keys make up for the new softmax scale (L5). A norm over a padded
    head sees a smaller mean square; sqrt(d' / d) brings it back (L7), except where rotated copies
    fill the new coordinates.
    """
    if widening.qk_norm is None:
        return widening.softmax_scale_ratio(layer) if kind == "k" else 1.0
    filled = widening.qk_norm == LIVE and kind == "q"
    return 1.0 if filled else widening.head_ratio


def qk_gain(widening: Widening, kind: str, layer: int) -> float:
    """What the gain of a query norm (kind `q_norm`) or key norm (`k_norm`) is multiplied by.

    Behind a norm that gives sqrt(d' / d) times the old values (`attention_factor`) the gain takes
    that back. A factor before the norm would be undone by it, so the key gain also makes up for the
    new softmax scale (L7).
    """
    if kind == "k_norm":
        return widening.softmax_scale_ratio(layer) / widening.head_ratio
    return 1 / widening.head_ratio if widening.qk_norm == DEAD else 1.0


def axis_growths(widening: Widening, spec: MapSpec) -> list[AxisGrowth]:
    """How every axis of a map grows; axes that stay are left out."""
    growths = []
    for position, axis in enumerate(spec.axes):
        expansion = widening.expansion(axis, spec.role) if axis in GROWABLE_AXES else None
        if expansion is None or expansion.is_identity:
            continue

        growth = AxisGrowth(position, expansion, reads=position >= len(spec.output))
        if growth.reads:
            init = _choose_read_init(expansion)
        else:
            init = _choose_written_init(widening, spec, axis, expansion)
        growth = replace(growth, init=init)

        if init == "rotate":
            growth = replace(growth, rotated_axis=spec.output.index("dim"))
        if init == "mean" and spec.part.scaled:
            # The stream gets the output times these factors, and the mean must be that of what the
            # stream gets; the factors of new coordinates are one.
            scale = widening.source.tensors[spec.part.scaled, spec.layer]
            growth = replace(growth, mean_weights=scale.read)
        growths.append(growth)
    return growths


def _choose_read_init(expansion: Expansion) -> Init:
    """What a map that reads an axis holds for new coordinates.

    Zeros silence a new unit that is written at random. Random numbers are allowed where the unit is
    zero, or where a pair cancels (L1).
    """
    return "random" if expansion.free == "reads" or expansion.pairs else "zero"


def _choose_written_init(
    widening: Widening, spec: MapSpec, axis: str, expansion: Expansion
) -> Init:
    """What a map that writes an axis holds for new coordinates: random numbers, which learn at
    once, wherever the function allows them.
    """
    if spec.signature.kind == "scale":
        return "one"
    if spec.part.norm:
        return "zero" if spec.signature.kind == "bias" else "one"

    # The stream: zeros, or the mean of the old coordinates where norms subtract a mean (L2, L3).
    if axis == "hidden":
        meets_layer_norm = widening.has_layer_norm and spec.part.writes in ("stream", "branch")
        return "mean" if meets_layer_norm else "zero"

    if spec.kind in ("q", "k") and (init := _choose_normed_init(widening, spec.kind, axis)):
        return init

    # New query coordinates meet new key coordinates: one of the two must be zero (L5).
    if spec.signature.kind == "bias" or (axis == "dim" and spec.kind == "k"):
        return "zero"

    # The operator zero_in silences what new units give, not what follows them: a head by its
    # values, a neuron by `up`. Queries, keys and gates may still be random.
    silenced = expansion.free == "reads" and spec.kind in ("v", "up")
    return "zero" if silenced else "random"


def _choose_normed_init(widening: Widening, kind: str, axis: str) -> Init | None:
    """What queries or keys (`kind` "q" or "k") hold for new coordinates under a norm of their own;
    None where no norm sees the axis.
    """
    # Rotated copies keep the mean square of a head, and zeros the values that the norm sees (L7).
    if widening.qk_norm and axis == "dim":
        return "rotate" if widening.qk_norm == LIVE and kind == "q" else "zero"
    return "rotate" if widening.has_full_qk_norm and axis in ("kv", "group") else None


def tied_head_gain(widening: Widening, count: int) -> Float[Tensor, " hidden"]:
    """Uneven shares of the `count` copies of the stream that a tied head reads: factors of the
    final norm (L4), float64.
    """
    # A tied head reads every copy with the same weights. Copy number i (1, 2, ..) gets the share i
    # / (1 + .. + count): the shares sum to one, and uneven ones let the copies separate.
    hidden = widening.hidden_expansion
    copy_number = torch.zeros(hidden.new, dtype=torch.float64)
    seen: dict[int, int] = {}
    for position, old in enumerate(hidden.index.tolist()):
        seen[old] = seen.get(old, 0) + 1
        copy_number[position] = seen[old]
    share = copy_number / (count * (count + 1) / 2)
    return torch.where(hidden.index < 0, 1.0, share)
