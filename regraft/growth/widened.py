"""The tensors of a wider model, as promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.anatomy import Part, Placed
from ..core.axes import Axes, Signature, product
from ..core.checkpoint import Lazy, Story
from ..errors import RegraftError
from .tensor import Draw, Side, grow, grow_moment, wide
from .widening import Widening, factor, head_gain, sides, view

Key = tuple[str, int | None]


def widened(widening: Widening) -> dict[Key, Lazy]:
    """Every tensor of the wider model by key: copied where nothing changes, grown otherwise."""
    placed = widening.anatomy.place(widening.config)
    before = widening.anatomy.place(widening.source.config)
    return {key: _lazy(widening, key, spot, before[key]) for key, spot in placed.items()}


def _lazy(widening: Widening, key: Key, spot: Placed, before: Placed) -> Lazy:
    source = widening.source.tensors[key]
    work = [
        Piece(widening, role, before.part, signature, output, key[1])
        for role, signature, output in pieces(before.part, key[0])
    ]
    if not any(piece.changes for piece in work):
        return source
    if source.shape == spot.shape and all(not piece.sides for piece in work):
        note = f"times {work[0].factor:.6g}"
    else:
        note = f"'{before.part.signature}' {list(source.shape)} to {list(spot.shape)}"
    story = Story("grown" if source.story.sources else source.story.kind, source.story.sources, note)
    return Lazy(spot.shape, source.dtype, story, _reader(widening, key, before, spot, work))


def _reader(widening: Widening, key: Key, before: Placed, spot: Placed, work: list[Piece]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        values = apart(widening.source.tensors[key].read(), before.part, widening.source.sizes)
        after = _following(widening, key, before, work)
        grown = [
            piece(value, after[i] if after else None) for i, (piece, value) in enumerate(zip(work, values, strict=True))
        ]
        value = together(grown, before.part)
        if tuple(value.shape) != spot.shape:
            raise RegraftError(f"'{spot.name}' grew to {list(value.shape)}, not {list(spot.shape)}: report this table")
        return value

    return read


def _following(widening: Widening, key: Key, before: Placed, work: list[Piece]) -> list[Tensor] | None:
    """The same tensor of the next layer, for operators that take further copies from there."""
    role, layer = key
    if layer is None or not any(side.expansion.following and not side.reads for piece in work for side in piece.sides):
        return None
    beyond = widening.source.tensors[role, min(layer + 1, widening.source.layers - 1)]
    return apart(beyond.read(), before.part, widening.source.sizes)


class Piece:
    """One of a part's fused maps (or the part itself) with its sides and factor."""

    def __init__(
        self, widening: Widening, role: str, part: Part, signature: Signature, output: Axes, layer: int | None
    ):
        self.widening, self.role, self.part, self.signature = widening, role, part, signature
        self.axes = view(signature, output)
        self.has_group = "group" in self.axes
        self.sides: list[Side] = sides(widening, role, part, signature, output, layer)
        self.factor = factor(widening, role, part, signature, layer)
        self.layer = layer
        copies = widening.hidden.copies or 1
        self.headed = part.norm and part.writes == "head" and widening.tied and copies > 1
        self.splits = widening.split > 1 and "kv" in self.axes

    @property
    def changes(self) -> bool:
        """Whether the tensor's values or shape differ from the source's."""
        return bool(self.sides) or self.factor != 1.0 or self.headed or (self.splits and not self.has_group)

    def __call__(self, value: Tensor, following: Tensor | None = None) -> Tensor:
        """Value (outputs, inputs) -> its grown form, axis by axis."""
        out = self._grown(value)
        if following is not None:
            beyond = self._grown(following)
            for side in self.sides:
                if side.expansion.following and not side.reads:
                    copies = torch.arange(side.expansion.old, side.expansion.new)
                    out.index_copy_(side.axis, copies, beyond.index_select(side.axis, copies))
        return out

    def _grown(self, value: Tensor) -> Tensor:
        widening = self.widening
        value = self.seen(value)
        if widening.source.holds != "weights":
            return self._moment(value)
        draw = Draw(widening.seed, f"{self.role.rpartition('.')[0]}.{self.layer}")
        shifted = self.signature.unit and (self.factor != 1.0 or self.headed or bool(self.sides))
        dtype = value.dtype
        if shifted:
            value = value.to(wide(dtype)) + 1
        out = grow(value, self.sides, self.factor, draw, widening.noise)
        if self.headed:
            out = (out.to(wide(dtype)) * head_gain(widening, widening.hidden.copies or 1).to(wide(dtype))).to(out.dtype)
        return (out - 1 if shifted else out).to(dtype)

    def seen(self, value: Tensor) -> Tensor:
        """Value (outputs, inputs) axis by axis, its key/value heads already split."""
        value = value.reshape(self.shape())
        if self.splits and not self.has_group:
            return value.repeat_interleave(self.widening.split, self.axes.index("kv"))
        return value

    def _moment(self, value: Tensor) -> Tensor:
        """Adam's moments follow their weights; copies of a gain that a tied head reads are each read in full."""
        whole = [replace(side.expansion, share=torch.ones(side.expansion.new)) for side in self.sides]
        sides = [replace(s, expansion=e) for s, e in zip(self.sides, whole, strict=True)] if self.headed else self.sides
        power = 1 if self.widening.source.holds == "exp_avg" else 2
        parts = self.widening.split if self.splits and not self.has_group else 1
        return grow_moment(value, sides, self.factor * parts, power)

    def shape(self) -> list[int]:
        """Sizes of the axes before growth; heads that are split are seen as more key/value heads already."""
        sizes = dict(self.widening.source.sizes)
        if self.splits and self.has_group:
            sizes["kv"], sizes["group"] = sizes["kv"] * self.widening.split, sizes["group"] // self.widening.split
        return [product((axis,), sizes) for axis in self.axes]


def pieces(part: Part, role: str) -> list[tuple[str, Signature, Axes]]:
    """(role, signature, output axes) of every map that is packed into a part."""
    whole = part.axes
    if not part.fused:
        return [(role, whole, whole.outputs[0])]
    ending = role.rpartition(".")[2]
    found = []
    for index, base in enumerate(part.fused):
        mine = whole.piece(index)
        found.append((f"{base}.{ending}", mine, mine.outputs[0]))
    return found


def apart(value: Tensor, part: Part, sizes: dict[str, int]) -> list[Tensor]:
    """A stored tensor as its maps, output first."""
    whole = part.axes
    value = value.T if part.stored == "in out" and whole.kind == "map" else value
    if not part.fused:
        return [value]
    if len(whole.outputs) > 1:
        return list(value.split([product(axes, sizes) for axes in whole.outputs]))
    axes = whole.outputs[0]
    split = value.unflatten(0, [product((axis,), sizes) for axis in axes])
    return [split.select(axes.index("three"), index).flatten(0, len(axes) - 2) for index in range(len(part.fused))]


def together(values: list[Tensor], part: Part) -> Tensor:
    """The inverse of `apart`: maps seen axis by axis, packed and stored as the part wants."""
    whole = part.axes
    inputs = len(whole.inputs)
    if whole.kind == "plain":
        dims = [len(stack[0]) for stack in whole.dims()]
        return _joined(values[0], dims)
    if len(whole.outputs) == 1 and part.fused:
        at = whole.outputs[0].index("three")
        values = [torch.stack(values, at)]
    flat = [_joined(value, [value.ndim - inputs] + ([inputs] if inputs else [])) for value in values]
    value = torch.cat(flat) if len(flat) > 1 else flat[0]
    return value.T if part.stored == "in out" and whole.kind == "map" else value


def _joined(value: Tensor, counts: list[int]) -> Tensor:
    """Groups of axes flattened into one each, `counts` axes a group."""
    sizes, begin = [], 0
    for count in counts:
        sizes.append(value.shape[begin : begin + count].numel())
        begin += count
    return value.reshape(sizes)
