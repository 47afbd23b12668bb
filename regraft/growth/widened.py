"""The tensors of a wider model, as promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.anatomy import Part, PlacedPart
from ..core.axes import Axes, Signature, product
from ..core.checkpoint import LazyTensor, Provenance
from ..core.fused import fused_maps, join_fused, split_fused
from ..errors import RegraftError
from .tensor import AxisGrowth, SeededRandom, compute_dtype, grow_moment, grow_tensor
from .widening import Widening, axis_growths, tensor_axes, tied_head_gain, weight_factor

Key = tuple[str, int | None]


def widen_tensors(widening: Widening) -> dict[Key, LazyTensor]:
    """Every tensor of the wider model by key: copied where nothing changes, grown otherwise."""
    placed = widening.anatomy.place(widening.config)
    before = widening.anatomy.place(widening.source.config)
    return {key: _widen_tensor(widening, key, spot, before[key]) for key, spot in placed.items()}


def _widen_tensor(widening: Widening, key: Key, spot: PlacedPart, before: PlacedPart) -> LazyTensor:
    source = widening.source.tensors[key]
    work = [
        MapWidener(widening, role, before.part, signature, output, key[1])
        for role, signature, output in fused_maps(before.part, key[0])
    ]
    if not any(piece.has_changes for piece in work):
        return source
    if source.shape == spot.shape and all(not piece.sides for piece in work):
        note = f"times {work[0].factor:.6g}"
    else:
        note = f"'{before.part.signature}' {list(source.shape)} to {list(spot.shape)}"
    story = Provenance(
        "grown" if source.story.sources else source.story.kind, source.story.sources, note
    )
    return LazyTensor(
        spot.shape, source.dtype, story, _build_reader(widening, key, before, spot, work)
    )


def _build_reader(
    widening: Widening, key: Key, before: PlacedPart, spot: PlacedPart, work: list[MapWidener]
) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        # Fused tensors are grown map by map and fused again.
        values = split_fused(
            widening.source.tensors[key].read(), before.part, widening.source.sizes
        )
        after = _read_next_layer(widening, key, before, work)
        grown = [
            piece(value, after[i] if after else None)
            for i, (piece, value) in enumerate(zip(work, values, strict=True))
        ]
        value = join_fused(grown, before.part)
        if tuple(value.shape) != spot.shape:
            raise RegraftError(
                f"'{spot.name}' grew to {list(value.shape)}, not {list(spot.shape)}: report this"
                " table"
            )
        return value

    return compute


def _read_next_layer(
    widening: Widening, key: Key, before: PlacedPart, work: list[MapWidener]
) -> list[Tensor] | None:
    """The same tensor of the next layer, for operators that take further copies from there."""
    role, layer = key
    if layer is None or not any(
        side.expansion.following and not side.reads for piece in work for side in piece.sides
    ):
        return None
    beyond = widening.source.tensors[role, min(layer + 1, widening.source.layers - 1)]
    return split_fused(beyond.read(), before.part, widening.source.sizes)


class MapWidener:
    """One of a part's fused maps (or the part itself) with its sides and factor."""

    def __init__(
        self,
        widening: Widening,
        role: str,
        part: Part,
        signature: Signature,
        output: Axes,
        layer: int | None,
    ):
        self.widening, self.role, self.part, self.signature = widening, role, part, signature
        self.axes = tensor_axes(signature, output)
        self.has_group = "group" in self.axes
        self.sides: list[AxisGrowth] = axis_growths(widening, role, part, signature, output, layer)
        self.factor = weight_factor(widening, role, part, signature, layer)
        self.layer = layer
        copies = widening.hidden_expansion.copies or 1
        self.headed = part.norm and part.writes == "head" and widening.has_tied_head and copies > 1
        self.splits = widening.split > 1 and "kv" in self.axes

    @property
    def has_changes(self) -> bool:
        """Whether the tensor's values or shape differ from the source's."""
        return (
            bool(self.sides)
            or self.factor != 1.0
            or self.headed
            or (self.splits and not self.has_group)
        )

    def __call__(self, value: Tensor, following: Tensor | None = None) -> Tensor:
        """Value (outputs, inputs) -> its grown form, axis by axis."""
        out = self._grow(value)
        if following is not None:
            beyond = self._grow(following)
            for side in self.sides:
                if side.expansion.following and not side.reads:
                    copies = torch.arange(side.expansion.old, side.expansion.new)
                    out.index_copy_(side.axis, copies, beyond.index_select(side.axis, copies))
        return out

    def _grow(self, value: Tensor) -> Tensor:
        widening = self.widening
        value = self.unflatten_axes(value)
        if widening.source.holds != "weights":
            return self._grow_moment(value)
        draw = SeededRandom(widening.seed, f"{self.role.rpartition('.')[0]}.{self.layer}")
        shifted = self.signature.unit and (self.factor != 1.0 or self.headed or bool(self.sides))
        dtype = value.dtype
        if shifted:
            value = value.to(compute_dtype(dtype)) + 1
        out = grow_tensor(value, self.sides, self.factor, draw, widening.noise)
        if self.headed:
            out = (
                out.to(compute_dtype(dtype))
                * tied_head_gain(widening, widening.hidden_expansion.copies or 1).to(
                    compute_dtype(dtype)
                )
            ).to(out.dtype)
        return (out - 1 if shifted else out).to(dtype)

    def unflatten_axes(self, value: Tensor) -> Tensor:
        """Value (outputs, inputs) axis by axis, its key/value heads already split."""
        value = value.reshape(self.shape())
        if self.splits and not self.has_group:
            return value.repeat_interleave(self.widening.split, self.axes.index("kv"))
        return value

    def _grow_moment(self, value: Tensor) -> Tensor:
        """Adam's moments follow their weights; copies of a gain that a tied head reads are each
        read in full.
        """
        whole = [
            replace(side.expansion, share=torch.ones(side.expansion.new)) for side in self.sides
        ]
        sides = (
            [replace(s, expansion=e) for s, e in zip(self.sides, whole, strict=True)]
            if self.headed
            else self.sides
        )
        power = 1 if self.widening.source.holds == "exp_avg" else 2
        parts = self.widening.split if self.splits and not self.has_group else 1
        return grow_moment(value, sides, self.factor * parts, power)

    def shape(self) -> list[int]:
        """Sizes of the axes before growth; heads that are split are seen as more key/value heads
        already.
        """
        sizes = dict(self.widening.source.sizes)
        if self.splits and self.has_group:
            sizes["kv"], sizes["group"] = (
                sizes["kv"] * self.widening.split,
                sizes["group"] // self.widening.split,
            )
        return [product((axis,), sizes) for axis in self.axes]
