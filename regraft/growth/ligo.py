"""A grown model as a differentiable function of a small one: LiGO on any family's axes.

Sections are those of docs/concepts/ligo.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.anatomy import Key
from ..core.axes import product
from ..core.fused import join_fused
from ..core.shapes import Float
from ..errors import RegraftError
from .depth import LayerOrigin
from .layer_mixing import SourceLayers, build_mixing, module_names
from .ligo_maps import AxisMap, flatten_head_axes
from .ligo_options import Ligo
from .norm_folding import can_fold_norms
from .widened import MapWidener
from .widening import GROWABLE_AXES, QUERY_KEY_KINDS, MapSpec, Widening, tied_head_gain

HEADS = ("kv", "group", "dim")
LINEAR = ("hidden", "dim")  # what a head reads of values is linear in them
Maps = dict[str, tuple[Tensor, Tensor]]  # (B, A), (new, old) each, by the space they map


@dataclass(frozen=True)
class AxisSpan:
    """Neighbouring axes of a tensor that one map acts on as one."""

    start: int  # position of the first axis
    count: int  # number of axes
    name: str  # the space that they are coordinates of, as `Grower.spaces` names it
    read: bool  # the tensor reads them, so that A acts; else B


def find_spans(spec: MapSpec, dense_heads: bool) -> list[AxisSpan]:
    """Which map acts on which axes of a tensor (section 1.2).

    Args:
        spec: the tensor.
        dense_heads: one map acts on all coordinates of all heads together (section 1.3).
    """
    spans: list[AxisSpan] = []
    for position, axis in enumerate(spec.axes):
        read = position >= len(spec.output)

        if dense_heads and axis in HEADS:
            # Queries, keys and values have a space each; only values are read as coordinates.
            name = "v" if read else spec.kind
            last = spans[-1] if spans else None
            if last and last.name == name and last.read == read:
                spans[-1] = AxisSpan(last.start, last.count + 1, name, read)
            else:
                spans.append(AxisSpan(position, 1, name, read))
        elif axis in GROWABLE_AXES:
            name = "qk" if axis == "dim" and spec.kind in QUERY_KEY_KINDS else axis
            spans.append(AxisSpan(position, 1, name, read))
    return spans


class Grower(nn.Module):
    """Every tensor of the grown model from the source's, the maps of axes and the mixing of layers.

    W'_i = B (sum_j w_ij W_j) A^T per map and layer i (section 1.1); all layers share B and A. Maps
    are mixed at their old size, then widened. A whole model of more layers than the source is
    widened first, which takes fewer products. RegraftError when the family cannot have such maps.

    Args:
        widening: the target's widths, and what the maps begin as.
        order: what each layer of the target is at first.
        method: LiGO's options.
        seed: of random rows and shares of layers.
    """

    def __init__(
        self, widening: Widening, order: Sequence[LayerOrigin], method: Ligo, seed: int = 0
    ):
        super().__init__()
        self.widening, self.order, self.method = widening, list(order), method
        self.source = widening.source
        self.placed = self.source.anatomy.place(self.source.config)

        # A must undo B on the stream even behind norms, so their gains move into the readers
        # (section 1.5).
        self.folds_norms = method.reads != "tied" and can_fold_norms(widening, self.placed)

        # One generator for all draws, in this order: a seed gives the same maps whatever was read.
        generator = torch.Generator().manual_seed(seed)
        self.spaces = nn.ModuleDict(self._build_axis_maps(generator))
        if method.reads == "orthogonal" and not self.folds_norms:
            raise RegraftError(
                "orthogonal maps need root-mean-square norms before their readers and an output"
                f" embedding of its own, which this {widening.family.family} has not: use reads"
                " inverse or tied"
            )
        mixing = build_mixing(widening, self.placed, self.order, method.blur, generator)
        self.mixing = nn.ParameterDict(mixing)
        self.layers = SourceLayers(widening, self.placed, self.folds_norms)

        # Free entries are what the starting operator has beyond the maps as they begin.
        self.start_maps: Maps = {
            name: (written.detach(), read.detach())
            for name, (written, read) in self._compute_maps().items()
        }
        self.free_entries: dict[str, Tensor] = {}

    def forward(self) -> dict[Key, Float[Tensor, "*axes"]]:
        """Every tensor of the target by key, float32, with a graph to the maps."""
        maps = self._compute_maps()
        tensors: dict[Key, Tensor] = {}
        for role, is_layered in {role: layer is not None for role, layer in self.placed}.items():
            layers: list[int | None] = [*range(len(self.order))] if is_layered else [None]
            values = self._compute_role(role, layers, maps)
            tensors |= {(role, i): value for i, value in zip(layers, values, strict=True)}
        return tensors

    @torch.no_grad()
    def compute_tensor(self, key: Key) -> Float[Tensor, "*new"]:
        """One tensor of the target, as forward gives it, without a graph."""
        role, layer = key
        return self._compute_role(role, [layer], self._compute_maps())[0]

    def cache_source(self) -> Grower:
        """Hold the source's tensors in memory from now on, as fitting reads them at every step."""
        self.layers.hold_in_memory()
        return self

    def _compute_maps(self) -> Maps:
        return {name: space() for name, space in self.spaces.items()}

    def _build_axis_maps(self, generator: torch.Generator) -> dict[str, AxisMap]:
        """The maps of every axis that grows."""
        widening, method = self.widening, self.method
        table = dict(widening.axes)
        if method.heads == "dense":
            self._check_dense_heads()
            heads = flatten_head_axes(table.pop("kv"), table.pop("dim"))
            table |= dict.fromkeys("qkv", heads)
            del table["qk"]

        spaces = {}
        for name, axis in table.items():
            if axis.is_identity:
                continue
            # Coordinates with rotary frequencies must not mix.
            learns = not (name == "qk" and widening.family.rotary)
            spaces[name] = AxisMap(axis, method, generator, name in LINEAR, learns)
            spaces[name].keeps_scale = self.folds_norms and name == "hidden"
        return spaces

    def _check_dense_heads(self) -> None:
        """RegraftError when the coordinates of all heads must not mix (section 1.3)."""
        sizes, family = self.widening.sizes, self.widening.family
        normed = any(
            part.norm and set(part.axes.outputs[0]) & set(HEADS) for part in self.widening.parts
        )
        if family.rotary:
            why = "rotary positions"
        elif normed:
            why = "norms on its queries"
        elif sizes["group"] > 1:
            why = "grouped queries"
        else:
            return
        raise RegraftError(
            f"dense maps would mix what the {why} of {family.family} keep apart: use heads blocks"
        )

    def _compute_role(
        self, role: str, layers: Sequence[int | None], maps: Maps
    ) -> list[Float[Tensor, "*axes"]]:
        """The tensors of a role in some layers of the target."""
        # Axes are alike in all layers. Factors, which may differ, are applied as layers are read.
        first = None if (role, None) in self.placed else 0
        part, wideners = self.placed[role, first].part, self.layers.wideners(role, first)

        wide = None
        if len(layers) > self.source.layers:
            wide = self._widen_then_mix(role, layers, wideners, maps)
        tensors: list[Tensor] = []
        for position, layer in enumerate(layers):
            if wide is None:
                small = self.layers.mix(role, layer, self.mixing)
                values = [
                    self._grow_map(one, value, maps)
                    for one, value in zip(wideners, small, strict=True)
                ]
            else:
                values = [
                    self._finish_gain(one, value[position])
                    for one, value in zip(wideners, wide, strict=True)
                ]

            if self.method.live and not part.norm:
                origin = None if layer is None else self.order[layer].source
                values = [
                    value + self._compute_free_entries(role, index, origin)
                    for index, value in enumerate(values)
                ]
            tensors.append(join_fused(values, part).contiguous())
        return tensors

    def _widen_then_mix(
        self,
        role: str,
        layers: Sequence[int | None],
        wideners: Sequence[MapWidener],
        maps: Maps,
    ) -> list[Float[Tensor, "layers ..."]] | None:
        """The maps of a role in these layers, made large, then mixed.

        None where the order matters, since a tensor does not grow linearly (gains of new
        coordinates are one), and where the source is not held in memory.
        """
        linear = not any(
            one.part.norm or one.signature.kind in ("gain", "scale") for one in wideners
        )
        names, stacks = module_names(wideners[0].part, role), self.layers.stacks.get(role)
        if not linear or stacks is None or names[0] not in self.mixing:
            return None

        mixed = []
        for name, widener, stack in zip(names, wideners, stacks, strict=True):
            large = torch.stack([self._apply_axis_maps(widener, value, maps) for value in stack])
            rows = self.mixing[name][torch.tensor(layers)]  # (layers, source layers)
            mixed.append(torch.tensordot(rows, large, 1))
        return mixed

    def _grow_map(
        self, widener: MapWidener, value: Float[Tensor, "*old"], maps: Maps
    ) -> Float[Tensor, "*new"]:
        """One map of the target from its small form."""
        if widener.part.norm and self.folds_norms and "hidden" in widener.signature.outputs[0]:
            return self._constant_gain(widener)
        return self._finish_gain(widener, self._apply_axis_maps(widener, value, maps))

    def _constant_gain(self, widener: MapWidener) -> Float[Tensor, " hidden"]:
        """Gains that have moved into the readers: the same number everywhere."""
        size = product(widener.signature.outputs[0], self.widening.sizes)
        return torch.full((size,), widener.factor - float(widener.signature.unit))

    def _finish_gain(
        self, widener: MapWidener, value: Float[Tensor, "*axes"]
    ) -> Float[Tensor, "*axes"]:
        """Shares of copies before a tied head, and gains that are stored minus one."""
        if widener.has_tied_shares:
            copies = self.widening.hidden_expansion.copies or 1
            value = value * tied_head_gain(self.widening, copies).float()
        return value - 1 if widener.signature.unit else value

    def _apply_axis_maps(
        self, widener: MapWidener, value: Float[Tensor, "*old"], maps: Maps
    ) -> Float[Tensor, "*new"]:
        """All maps of a tensor's axes, the larger old axis first: fewest products."""
        spans = find_spans(widener.spec, self.method.heads == "dense")
        spans = [span for span in spans if span.name in maps]
        for span in sorted(spans, key=lambda span: -maps[span.name][0].shape[1]):
            value = self._apply_axis_map(widener, value, span, maps[span.name][span.read])
        return value

    def _apply_axis_map(
        self,
        widener: MapWidener,
        value: Float[Tensor, "*old"],
        span: AxisSpan,
        matrix: Float[Tensor, "new old"],
    ) -> Float[Tensor, "*new"]:
        """One map (B or A) along the axes of a span."""
        start, end = span.start, span.start + span.count
        flat = value.flatten(start, end - 1)
        space = self.spaces[span.name]
        assert isinstance(space, AxisMap)

        # [I; C] need not multiply by I: the first rows are the old values.
        same = space.identity_count(span.read)
        out = torch.tensordot(flat, matrix[same:], ([start], [1])).movedim(-1, start)
        out = torch.cat([flat, out], start) if same else out

        # Gains of new coordinates act on zeros at first; they begin at one, not at zero.
        if widener.signature.kind in ("gain", "scale"):
            out = out.index_fill(start, space.silent, 1.0)
        if span.count == 1:
            return out
        sizes = [product((axis,), self.widening.sizes) for axis in widener.axes[start:end]]
        return out.reshape(*value.shape[:start], *sizes, *value.shape[end:])

    @torch.no_grad()
    def _compute_free_entries(
        self, role: str, index: int, layer: int | None
    ) -> Float[Tensor, "*new"]:
        """What the operator that the maps begin with writes beyond them, for one map of a part."""
        name = f"{role}.{index}.{layer}"
        if name not in self.free_entries:
            widener = self.layers.wideners(role, layer)[index]
            value = self.layers.split(role, layer)[index]
            small = widener.unflatten_axes(value) * widener.factor
            by_maps = self._apply_axis_maps(widener, small, self.start_maps)
            self.free_entries[name] = widener(value) - by_maps
        return self.free_entries[name]
