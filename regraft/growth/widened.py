"""The tensors of a wider model, each computed when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.anatomy import Key, Part, PlacedPart
from ..core.axes import product
from ..core.checkpoint import LazyTensor, Provenance
from ..core.fused import fused_maps, join_fused, split_fused
from ..core.shapes import Float
from ..errors import RegraftError
from .tensor import AxisGrowth, SeededRandom, compute_dtype, grow_moment, grow_tensor
from .widening import MapSpec, Widening, axis_growths, tied_head_gain, weight_factor


def widen_tensors(widening: Widening) -> dict[Key, LazyTensor]:
    """Every tensor of the wider model by key: copied where nothing changes, grown otherwise."""
    targets = widening.anatomy.place(widening.config)
    sources = widening.anatomy.place(widening.source.config)
    return {
        key: _widen_tensor(widening, key, sources[key], target) for key, target in targets.items()
    }


def _widen_tensor(
    widening: Widening, key: Key, source: PlacedPart, target: PlacedPart
) -> LazyTensor:
    lazy = widening.source.tensors[key]
    wideners = [MapWidener(widening, spec) for spec in map_specs(source.part, *key)]
    if not any(widener.has_changes for widener in wideners):
        return lazy

    if lazy.shape == target.shape and all(not widener.growths for widener in wideners):
        note = f"times {wideners[0].factor:.6g}"
    else:
        note = f"'{source.part.signature}' {list(lazy.shape)} to {list(target.shape)}"
    # A tensor that comes from no file (a new layer's) stays what it was: zero or fresh.
    kind = "grown" if lazy.provenance.sources else lazy.provenance.kind
    provenance = Provenance(kind, lazy.provenance.sources, note)
    reader = _build_reader(widening, key, source, target, wideners)
    return LazyTensor(target.shape, lazy.dtype, provenance, reader)


def _build_reader(
    widening: Widening,
    key: Key,
    source: PlacedPart,
    target: PlacedPart,
    wideners: list[MapWidener],
) -> Callable[[], Float[Tensor, "*stored"]]:
    def compute() -> Float[Tensor, "*stored"]:
        # Fused tensors are grown map by map and fused again.
        stored = widening.source.tensors[key].read()
        values = split_fused(stored, source.part, widening.source.sizes)
        next_values = _read_next_layer(widening, key, source, wideners)
        grown = [
            widener(values[index], next_values[index] if next_values else None)
            for index, widener in enumerate(wideners)
        ]
        value = join_fused(grown, source.part)

        if tuple(value.shape) != target.shape:
            raise RegraftError(
                f"'{target.name}' grew to {list(value.shape)}, not {list(target.shape)}: report"
                " this table"
            )
        return value

    return compute


def _read_next_layer(
    widening: Widening, key: Key, source: PlacedPart, wideners: list[MapWidener]
) -> list[Float[Tensor, "*axes"]] | None:
    """The same tensor of the next layer, for operators that take further copies from there."""
    role, layer = key
    if layer is None or not any(widener.copies_next_layer for widener in wideners):
        return None
    # The last layer has no next one: it takes its own.
    following = widening.source.tensors[
        role, min(layer + 1, widening.source.sizes[source.part.stack] - 1)
    ]
    return split_fused(following.read(), source.part, widening.source.sizes)


class MapWidener:
    """Widens one map of a part: its values (outputs, inputs) become the grown map, one dimension
    per axis.
    """

    def __init__(self, widening: Widening, spec: MapSpec):
        self.widening, self.spec = widening, spec
        self.role, self.part, self.signature = spec.role, spec.part, spec.signature
        self.axes = spec.axes
        self.growths: list[AxisGrowth] = axis_growths(widening, spec)
        self.factor = weight_factor(widening, spec)

        # The final norm before a tied head carries the shares of copies that the head cannot (L4).
        copies = widening.hidden_expansion.copies or 1
        before_head = spec.part.norm and spec.part.writes == "head"
        self.has_tied_shares = before_head and widening.has_tied_head and copies > 1

        # Splitting key/value heads: tensors of queries see more heads with smaller groups, tensors
        # of keys and values (which have no axis `group`) are repeated (L8).
        splits = widening.split > 1 and "kv" in self.axes
        self.regroups = splits and "group" in self.axes
        self.repeats_heads = splits and "group" not in self.axes

    @property
    def has_changes(self) -> bool:
        """Whether the tensor's values or shape differ from the source's."""
        return (
            bool(self.growths) or self.factor != 1.0 or self.has_tied_shares or self.repeats_heads
        )

    @property
    def copies_next_layer(self) -> bool:
        """Whether further copies hold what the next layer writes (AKI)."""
        return any(map(_follows, self.growths))

    def __call__(
        self, value: Float[Tensor, "*old"], next_value: Float[Tensor, "*old"] | None = None
    ) -> Float[Tensor, "*new"]:
        """The grown form of a map.

        Args:
            value: the map as the source has it, (outputs, inputs) or (outputs,).
            next_value: the same map of the next layer, for operators that copy from it.

        Returns:
            The grown map, one dimension per axis.
        """
        out = self._grow(value)
        if next_value is not None:
            grown_next = self._grow(next_value)
            for growth in filter(_follows, self.growths):
                copies = torch.arange(growth.expansion.old, growth.expansion.new)
                out.index_copy_(growth.axis, copies, grown_next.index_select(growth.axis, copies))
        return out

    def _grow(self, value: Float[Tensor, "*old"]) -> Float[Tensor, "*new"]:
        widening, dtype = self.widening, value.dtype
        value = self.unflatten_axes(value)
        if widening.source.holds != "weights":
            return self._grow_moment(value)

        # The name has no ending: a weight and its bias draw the same numbers, for the same rotation
        # of queries.
        name = f"{self.role.rpartition('.')[0]}.{self.spec.layer}"
        random = SeededRandom(widening.seed, name)

        # Gains that are stored minus one are grown as they act (L11).
        shifted = self.signature.unit and (
            self.factor != 1.0 or self.has_tied_shares or bool(self.growths)
        )
        if shifted:
            value = value.to(compute_dtype(dtype)) + 1
        out = grow_tensor(value, self.growths, self.factor, random, widening.noise)
        if self.has_tied_shares:
            shares = tied_head_gain(widening, widening.hidden_expansion.copies or 1)
            computed = out.to(compute_dtype(dtype)) * shares.to(compute_dtype(dtype))
            out = computed.to(out.dtype)
        return (out - 1 if shifted else out).to(dtype)

    def unflatten_axes(self, value: Float[Tensor, "*flat"]) -> Float[Tensor, "*axes"]:
        """A map (outputs, inputs) with one dimension per axis, its key/value heads split."""
        value = value.reshape(self.shape())
        if self.repeats_heads:
            return value.repeat_interleave(self.widening.split, self.axes.index("kv"))
        return value

    def _grow_moment(self, value: Float[Tensor, "*old"]) -> Float[Tensor, "*new"]:
        """Adam's moments follow their weights (section 7)."""
        # The embedding reads every copy of a gain before a tied head in full, so gradients of the
        # gain's copies are not shared.
        growths = self.growths
        if self.has_tied_shares:
            growths = [_read_in_full(growth) for growth in growths]

        # A split head's parts each serve a part of the queries, and so get a part of the gradient.
        parts = self.widening.split if self.repeats_heads else 1
        power = 1 if self.widening.source.holds == "exp_avg" else 2
        return grow_moment(value, growths, self.factor * parts, power)

    def shape(self) -> list[int]:
        """Sizes of the axes before growth; regrouped heads are counted as more key/value heads."""
        sizes, split = dict(self.widening.source.sizes), self.widening.split
        if self.regroups:
            sizes["kv"], sizes["group"] = sizes["kv"] * split, sizes["group"] // split
        return [product((axis,), sizes) for axis in self.axes]


def _follows(growth: AxisGrowth) -> bool:
    return growth.expansion.following and not growth.reads


def _read_in_full(growth: AxisGrowth) -> AxisGrowth:
    share = torch.ones(growth.expansion.new)
    return replace(growth, expansion=replace(growth.expansion, share=share))


def map_specs(part: Part, role: str, layer: int | None) -> list[MapSpec]:
    """The maps that are packed into a part, of one layer."""
    return [
        MapSpec(name, part, signature, output, layer)
        for name, signature, output in fused_maps(part, role)
    ]
