"""Widening: which sides and which factor every tensor gets, from its signature, its role and its
streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.anatomy import Anatomy, Part
from ..core.axes import Axes, Expansion, Signature, identity
from ..core.checkpoint import Checkpoint
from .tensor import AxisGrowth

GROWABLE_AXES = ("hidden", "ffn", "kv", "group", "dim")
LIVE, DEAD = "live", "dead"


@dataclass(frozen=True)
class Widening:
    """Everything that decides what a wider model's tensors hold.

    `axes`: the expansion of each axis (missing: unchanged); "qk" is that of `dim` for queries and
    keys, whose coordinates may carry rotary frequencies. `split`: parts that every key/value head
    is first split into. `fold`: how the norms' mean square is kept over a padded stream: `stream`
    multiplies everything written, `eps` the gains and the config's epsilon. `noise`: of readers of
    copies, relative to the tensor.
    """

    source: Checkpoint
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    axes: Mapping[str, Expansion]
    split: int = 1
    fold: Literal["stream", "eps"] = "eps"
    noise: float = 0.0
    seed: int = 0
    qk_norm: str | None = field(default=None)

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
        name = "qk" if axis == "dim" and kind_of(role) in ("q", "k", "q_norm", "k_norm") else axis
        return self.axes.get(name) or identity(self.source.sizes.get(axis, 1))

    @property
    def hidden_expansion(self) -> Expansion:
        """The expansion of the residual stream."""
        return self.expansion("hidden", "")

    @cached_property
    def has_layer_norm(self) -> bool:
        """Whether norms over the stream subtract the mean."""
        return any(
            p.norm and p.axes.kind == "bias" and "hidden" in p.axes.outputs[0] for p in self.parts
        )

    @cached_property
    def has_full_qk_norm(self) -> bool:
        """Whether query and key norms run over all heads at once."""
        return any(p.norm and "kv" in p.axes.outputs[0] for p in self.parts)

    @cached_property
    def parts(self) -> list[Part]:
        """The distinct parts of the source."""
        return list(
            {id(s.part): s.part for s in self.anatomy.place(self.source.config).values()}.values()
        )

    @cached_property
    def has_tied_head(self) -> bool:
        """Whether the output embedding is the input embedding."""
        return ("embed.weight", None) in self.source.tensors and bool(
            self.anatomy.fill_defaults(self.source.config).get("tie_word_embeddings")
        )

    @property
    def rms_ratio(self) -> float:
        """What the root mean square of the stream is divided by when old values are kept: sqrt(h' /
        (copies h)).
        """
        return math.sqrt(
            self.hidden_expansion.new
            / ((self.hidden_expansion.copies or 1) * self.hidden_expansion.old)
        )

    def stream_scale(self, stream: str) -> float:
        """What values in a stream of hidden size are multiplied by."""
        if stream in ("stream", "branch"):
            return self.rms_ratio if self.fold == "stream" else 1.0
        if stream == "head" and self.has_tied_head:
            return 1 / self.embed_factor
        return 1.0

    @property
    def embed_factor(self) -> float:
        """What the stored embedding is multiplied by."""
        rooted = (
            math.sqrt(self.hidden_expansion.old / self.hidden_expansion.new)
            if self.family.embed_scale
            else 1.0
        )
        return self.stream_scale("stream") * rooted

    @property
    def eps(self) -> float | None:
        """The norms' new epsilon, None when it stays."""
        old = self.anatomy.fill_defaults(self.source.config).get(self.family.eps)
        return (
            float(old) / self.rms_ratio**2
            if self.fold == "eps" and self.rms_ratio != 1 and old is not None
            else None
        )

    def softmax_scale_ratio(self, layer: int) -> float:
        """Old softmax scale over the new one: what keys are multiplied by to make up for it."""
        scale = self.family.scale
        before = scale(
            self.anatomy.fill_defaults(self.source.config), self.source.sizes["dim"], layer
        )
        return before / scale(self.anatomy.fill_defaults(self.config), self.sizes["dim"], layer)


def kind_of(role: str) -> str:
    """`q` of attn.q.weight, `up` of mlp.3.up.bias."""
    return role.split(".")[-2] if "." in role else role


def tensor_axes(signature: Signature, output: Axes) -> list[str]:
    """The axes of one output of a tensor, output first."""
    return [axis for axis in (*output, *signature.inputs)]


def weight_factor(
    widening: Widening, role: str, part: Part, signature: Signature, layer: int | None
) -> float:
    """What the old entries of a tensor are multiplied by, shares of copies aside."""
    if role == "embed.weight":
        return widening.embed_factor

    # Writers of the stream are multiplied by its scale, readers divided by it; a norm in between
    # makes up for the changed mean square (L2, L3).
    hidden_out = any("hidden" in output for output in signature.outputs)
    if signature.kind == "scale":
        return 1.0
    if part.norm:
        if not hidden_out:
            return qk_gain(widening, kind_of(role), layer or 0)
        return widening.stream_scale(part.writes) / (
            widening.rms_ratio if signature.kind == "gain" else 1.0
        )
    value = widening.stream_scale(part.writes) if hidden_out else 1.0
    if "hidden" in signature.inputs:
        value /= widening.stream_scale(part.reads)
    if kind_of(role) in ("q", "k") and role.startswith("attn."):
        value *= attention_factor(widening, kind_of(role), layer or 0)
    return value


def attention_factor(widening: Widening, kind: str, layer: int) -> float:
    """What queries and keys are multiplied by so that their products, divided by the new softmax
    scale, stay.
    """
    growth = math.sqrt(widening.sizes["dim"] / widening.source.sizes["dim"])
    if widening.qk_norm == DEAD or (widening.qk_norm == LIVE and kind == "k"):
        return growth
    return widening.softmax_scale_ratio(layer) if kind == "k" and widening.qk_norm is None else 1.0


def qk_gain(widening: Widening, kind: str, layer: int) -> float:
    """What the gains of query and key norms are multiplied by: the norm undoes a factor on its
    input, so the softmax scale has to be made up for here, and the mean square of padded heads.
    """
    growth = math.sqrt(widening.sizes["dim"] / widening.source.sizes["dim"])
    wanted = widening.softmax_scale_ratio(layer)
    if widening.qk_norm == DEAD:
        return wanted / growth if kind == "k_norm" else 1 / growth
    return wanted / growth if kind == "k_norm" else 1.0


def axis_growths(
    widening: Widening, role: str, part: Part, signature: Signature, output: Axes, layer: int | None
) -> list[AxisGrowth]:
    """How every axis of one output of a tensor grows."""
    table = []
    for position, axis in enumerate(tensor_axes(signature, output)):
        expansion = widening.expansion(axis, role) if axis in GROWABLE_AXES else None
        if expansion is None or expansion.is_identity:
            continue
        reads = position >= len(output)
        side = AxisGrowth(position, expansion, reads)
        if reads:
            table.append(_choose_read_init(side))
            continue
        side = _choose_written_init(widening, side, axis, role, part, signature, output)
        if (
            side.fresh == "mean" and part.scaled
        ):  # averages of what reaches the stream, whose new factors are one
            side = replace(side, weights=widening.source.tensors[part.scaled, layer].read)
        table.append(side)
    return table


def _choose_read_init(side: AxisGrowth) -> AxisGrowth:
    free = side.expansion.free == "reads" or side.expansion.pairs
    return replace(side, fresh="free" if free else "zero")


def _choose_written_init(
    widening: Widening,
    side: AxisGrowth,
    axis: str,
    role: str,
    part: Part,
    signature: Signature,
    output: Axes,
) -> AxisGrowth:
    """What new coordinates hold that a tensor writes."""
    kind = kind_of(role)
    if signature.kind == "scale":
        return replace(side, fresh="one")
    if part.norm:
        if axis != "hidden" and signature.kind == "bias":
            return side
        return replace(side, fresh="zero" if signature.kind == "bias" else "one")
    if axis == "hidden":
        # Zero, or the mean of the old coordinates where the norms subtract a mean (L2, L3).
        average = widening.has_layer_norm and part.writes in ("stream", "branch")
        return replace(side, fresh="mean" if average else "zero")

    # Norms over a head: rotated copies keep its mean square, else new coordinates stay zero (L7).
    if widening.qk_norm and kind in ("q", "k") and axis == "dim":
        return (
            replace(side, fresh="turn", turned=output.index("dim"))
            if has_rotated_copies(widening, kind)
            else side
        )
    if widening.has_full_qk_norm and kind in ("q", "k") and axis in ("kv", "group"):
        return replace(side, fresh="turn", turned=output.index("dim"))
    if signature.kind == "bias" or (axis == "dim" and kind == "k"):
        return side

    # Free entries are allowed where what reads them begins at zero.
    strict = side.expansion.free == "reads" and kind in ("v", "up")
    return side if strict else replace(side, fresh="free")


def has_rotated_copies(widening: Widening, kind: str) -> bool:
    """Whether new coordinates of a normed query or key hold turned copies."""
    return widening.qk_norm == LIVE and kind == "q"


def tied_head_gain(widening: Widening, count: int) -> Tensor:
    """Uneven shares of copies that a tied head reads through the final norm: (new,) float64."""
    hidden = widening.hidden_expansion
    order = torch.zeros(hidden.new, dtype=torch.float64)
    seen: dict[int, int] = {}
    for position, old in enumerate(hidden.index.tolist()):
        seen[old] = seen.get(old, 0) + 1
        order[position] = seen[old]
    share = order / (count * (count + 1) / 2)
    return torch.where(hidden.index < 0, 1.0, share)
