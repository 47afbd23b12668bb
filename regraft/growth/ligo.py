"""A grown model as a differentiable function of a small one: LiGO on any family's axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.anatomy import Key, Part
from ..core.axes import product
from ..core.fused import fused_maps, join_fused, split_fused
from ..errors import RegraftError
from .depth import IdentityLayer, LayerOrigin
from .ligo_maps import AxisMap, Ligo, flatten_head_axes
from .widened import MapWidener
from .widening import GROWABLE_AXES, Widening, kind_of, tied_head_gain

HEADS = ("kv", "group", "dim")
MAX_STACKED_ENTRIES = (
    1 << 26
)  # entries of one map in all layers that are in memory at once when a fitted model is written
QUERIES = ("q", "k", "q_norm", "k_norm")
Maps = dict[str, tuple[Tensor, Tensor]]
LINEAR = ("hidden", "dim")  # what a head reads of values is linear in them


@dataclass(frozen=True)
class AxisSpan:
    """Axes of a tensor that one map acts on: `count` of them from `begin`, by the space `name`."""

    begin: int
    count: int
    name: str
    read: bool


class Grower(nn.Module):
    """Every tensor of the grown model from the source's, the maps of axes and the mixing of layers.

    `order`: what each target layer is at first. W'_i = B (sum_j w_ij W_j) A^T per map and layer i,
    all layers sharing their maps: one tensor is mixed small; a whole model of more layers than the
    source is widened first, then mixed.
    """

    def __init__(
        self, widening: Widening, order: Sequence[LayerOrigin], method: Ligo, seed: int = 0
    ):
        super().__init__()
        self.widening, self.order, self.method = widening, list(order), method
        self.source = widening.source
        self.before = self.source.anatomy.place(self.source.config)
        self.stacks: dict[str, list[Tensor]] = {}
        self.free: dict[str, Tensor] = {}

        # One generator for all draws, in this order: a seed gives the same maps whatever was read.
        draw = torch.Generator().manual_seed(seed)
        self.spaces = nn.ModuleDict(self._build_axis_maps(draw))
        self.folds = method.reads != "tied" and self._can_fold_norms()
        if method.reads == "orthogonal" and not self.folds:
            raise RegraftError(
                "orthogonal maps need root-mean-square norms before their readers and an output"
                f" embedding of its own, which this {widening.family.family} has not: use reads"
                " inverse or tied"
            )
        for name, space in self.spaces.items():
            if isinstance(space, AxisMap):
                space.levels = self.folds and name == "hidden"
        self.mixing = nn.ParameterDict(self._build_mixing(draw))

        # The maps at the start: free entries are measured against them, and `reads="inverse"`
        # follows them.
        self.begun = {
            name: (one[0].detach(), one[1].detach()) for name, one in self._compute_maps().items()
        }

    def forward(self) -> dict[Key, Tensor]:
        """Every tensor of the target by key, float32, with a graph to the maps."""
        maps = self._compute_maps()
        found: dict[Key, Tensor] = {}
        for role, layered in {role: layer is not None for role, layer in self.before}.items():
            layers = list(range(len(self.order))) if layered else [None]
            found |= {
                (role, i): value
                for i, value in zip(layers, self._compute_role(role, layers, maps), strict=True)
            }
        return found

    @torch.no_grad()
    def compute_tensor(self, key: Key) -> Tensor:
        """One tensor of the target, as forward gives it."""
        return self._compute_role(key[0], [key[1]], self._compute_maps())[0]

    def _compute_maps(self) -> Maps:
        return {name: space() for name, space in self.spaces.items()}

    def cache_source(self) -> Grower:
        """Hold the source's tensors in memory from now on, as fitting reads them at every step."""
        for role in dict.fromkeys(role for role, _ in self.before):
            self.stacks[role] = self._stack_layers(role)
        return self

    def _build_axis_maps(self, draw: torch.Generator) -> dict[str, AxisMap]:
        widening, method = self.widening, self.method
        table = dict(widening.axes)
        if method.heads == "dense":
            self._check_dense()
            whole = flatten_head_axes(table.pop("kv"), table.pop("dim"))
            table |= dict.fromkeys("qkv", whole)
            del table["qk"]
        return {
            name: AxisMap(
                axis, method, draw, name in LINEAR, not (name == "qk" and widening.family.rotary)
            )
            for name, axis in table.items()
            if not axis.is_identity
        }

    def _check_dense(self) -> None:
        sizes, anatomy = self.widening.sizes, self.widening.family
        normed = any(
            part.norm and set(part.axes.outputs[0]) & set(HEADS) for part in self.widening.parts
        )
        if anatomy.rotary or sizes["group"] > 1 or normed:
            why = (
                "rotary positions"
                if anatomy.rotary
                else "norms on its queries"
                if normed
                else "grouped queries"
            )
            raise RegraftError(
                f"dense maps would mix what the {why} of {anatomy.family} keep apart: use heads"
                " blocks"
            )

    def _can_fold_norms(self) -> bool:
        """Whether the gain of every norm over the stream can move into what reads it."""
        norms = [
            part for part in self.widening.parts if part.norm and "hidden" in part.axes.outputs[0]
        ]
        plain = all(part.axes.kind == "gain" and part.reads == "stream" for part in norms)
        kinds = {role for role, _ in self.before}
        readers = {
            role: spot.part
            for (role, _), spot in self.before.items()
            if self._reads_hidden(spot.part)
        }
        return (
            plain
            and all(self._norm_before(role, part) in kinds for role, part in readers.items())
            and not self._has_tied_head()
        )

    def _has_tied_head(self) -> bool:
        return self.widening.has_tied_head and self.widening.family.causal

    @staticmethod
    def _reads_hidden(part: Part) -> bool:
        return part.axes.kind == "map" and part.axes.inputs == ("hidden",) and not part.norm

    @staticmethod
    def _norm_before(role: str, part: Part) -> str:
        """The norm whose output a map reads."""
        return (
            "norm.final.weight"
            if part.reads == "head" or role == "head.weight"
            else f"norm.{role.split('.')[0]}.weight"
        )

    def _build_mixing(self, draw: torch.Generator) -> dict[str, nn.Parameter]:
        """w, (target layers, source layers), of every kind of module; none without more layers."""
        count = self.source.layers

        # Without new layers there is nothing to mix.
        if [layer.source for layer in self.order] == list(range(count)):
            return {}
        quiet = IdentityLayer(self.source, self.before)
        if quiet.hands_on and any(layer.new for layer in self.order):
            raise RegraftError(
                f"idle layers of {self.widening.family.family} hand on the norm before them, which"
                " is no mixture of layers: use depth stack or interpolate"
            )

        # One matrix w a kind of module (attention, MLP, norms), as the paper has it: rows are
        # layers of the target, columns layers of the source. A new layer of an exact start is
        # silent: row 0.
        table: dict[str, nn.Parameter] = {}
        for role in dict.fromkeys(role for role, layer in self.before if layer is not None):
            silent = role in quiet.gains or (role in quiet.outputs and not quiet.gains)
            start = torch.zeros(len(self.order), count)
            for i, layer in enumerate(self.order):
                start[i, layer.source] = 0.0 if layer.new and silent else 1.0
            for name in self._module_names(role):
                if name not in table:
                    blurred = start + self.method.blur * torch.rand(start.shape, generator=draw) * (
                        start.sum(1, keepdim=True) > 0
                    )
                    table[name] = nn.Parameter(
                        blurred / blurred.sum(1, keepdim=True).clamp(min=1.0)
                    )
        return table

    def _module_names(self, role: str) -> list[str]:
        """The kinds of module that a layer's tensor holds, as `mixing` names them."""
        return [
            base.rpartition(".")[0].replace(".", "_")
            for base, _, _ in fused_maps(self.before[role, 0].part, role)
        ]

    def _build_wideners(self, role: str, layer: int | None) -> list[MapWidener]:
        part = self.before[role, layer].part
        return [
            MapWidener(self.widening, name, part, axes, output, layer)
            for name, axes, output in fused_maps(part, role)
        ]

    def _read_maps(self, role: str, layer: int | None) -> list[Tensor]:
        """The maps of one tensor of the source, seen axis by axis, with their factors."""
        values = split_fused(
            self.source.tensors[role, layer].read().float(),
            self.before[role, layer].part,
            self.source.sizes,
        )
        return [
            self._scale_source(p, v, layer)
            for p, v in zip(self._build_wideners(role, layer), values, strict=True)
        ]

    def _stack_layers(self, role: str) -> list[Tensor]:
        """The maps of a role in all layers of the source, (source layers, ...) each."""
        layers = [None] if (role, None) in self.before else list(range(self.source.layers))
        return [
            torch.stack(list(column))
            for column in zip(*(self._read_maps(role, layer) for layer in layers), strict=True)
        ]

    def _mix_layers(self, role: str, layer: int | None) -> list[Tensor]:
        """The maps of a role for one layer of the target, still at their small size."""
        names = [] if layer is None else self._module_names(role)
        if layer is None or names[0] not in self.mixing:
            return (
                [stack[layer or 0] for stack in self.stacks[role]]
                if role in self.stacks
                else self._read_maps(role, layer)
            )

        # All source layers in one product where they fit in memory, else one after another.
        rows = [self.mixing[name][layer] for name in names]
        if (
            role in self.stacks
            or self.source.layers * self.source.tensors[role, 0].size <= MAX_STACKED_ENTRIES
        ):
            stacks = self.stacks.get(role) or self._stack_layers(role)
            return [torch.tensordot(row, stack, 1) for row, stack in zip(rows, stacks, strict=True)]
        total: list[Tensor] = []
        for source, shares in enumerate(torch.stack(rows, 1).tolist()):
            values = [
                share * value
                for share, value in zip(shares, self._read_maps(role, source), strict=True)
            ]
            total = (
                [one.add_(value) for one, value in zip(total, values, strict=True)]
                if total
                else values
            )
        return total

    def _scale_source(self, piece: MapWidener, value: Tensor, layer: int | None) -> Tensor:
        value = piece.unflatten_axes(value)
        if piece.signature.unit:
            value = value + 1
        if self.folds and self._reads_hidden(piece.part):
            norm = self._norm_before(piece.role, piece.part)
            key = (norm, None if (norm, None) in self.before else layer)
            gain = self.source.tensors[key].read().float()
            value = value * (gain + 1 if self.before[key].part.axes.unit else gain)
        return value * piece.factor

    def _compute_role(self, role: str, layers: Sequence[int | None], maps: Maps) -> list[Tensor]:
        """The tensors of a role in some layers of the target."""
        first = None if (role, None) in self.before else 0
        part, work = self.before[role, first].part, self._build_wideners(role, first)
        wide = (
            self._widen_then_mix(role, layers, work, maps)
            if len(layers) > self.source.layers
            else None
        )
        made: list[Tensor] = []
        for at, layer in enumerate(layers):
            if wide is None:
                values = [
                    self._grow_map(p, value, maps)
                    for p, value in zip(work, self._mix_layers(role, layer), strict=True)
                ]
            else:
                values = [
                    self._apply_head_gain(p, value[at]) for p, value in zip(work, wide, strict=True)
                ]
            if self.method.live and not part.norm:
                home = None if layer is None else self.order[layer].source
                values = [
                    value + self._compute_free_entries(role, index, home)
                    for index, value in enumerate(values)
                ]
            made.append(join_fused(values, part).contiguous())
        return made

    def _widen_then_mix(
        self, role: str, layers: Sequence[int | None], work: Sequence[MapWidener], maps: Maps
    ) -> list[Tensor] | None:
        """The maps of a role in these layers, (layers, ...) each: made large, then mixed. None
        where a tensor does not grow linearly, or none is held in memory.
        """
        linear = not any(
            piece.part.norm or piece.signature.kind in ("gain", "scale") for piece in work
        )
        names, made = self._module_names(role), []
        if not linear or role not in self.stacks or names[0] not in self.mixing:
            return None
        for name, piece, stack in zip(names, work, self.stacks[role], strict=True):
            large = torch.stack([self._apply_axis_maps(piece, value, maps) for value in stack])
            made.append(torch.tensordot(self.mixing[name][torch.tensor(layers)], large, 1))
        return made

    def _grow_map(self, piece: MapWidener, value: Tensor, maps: Maps) -> Tensor:
        """One piece of the target from its small form."""
        if piece.part.norm and self.folds and "hidden" in piece.signature.outputs[0]:
            return self._constant_gain(piece)
        return self._apply_head_gain(piece, self._apply_axis_maps(piece, value, maps))

    def _apply_head_gain(self, piece: MapWidener, value: Tensor) -> Tensor:
        if piece.headed:
            value = (
                value
                * tied_head_gain(self.widening, self.widening.hidden_expansion.copies or 1).float()
            )
        return value - 1 if piece.signature.unit else value

    def _apply_axis_maps(self, piece: MapWidener, value: Tensor, maps: Maps) -> Tensor:
        spans = [span for span in self._find_spans(piece) if span.name in maps]
        for span in sorted(
            spans, key=lambda span: -maps[span.name][0].shape[1]
        ):  # the larger first: fewest products
            value = self._apply_axis_map(piece, value, span, maps[span.name][span.read])
        return value

    @torch.no_grad()
    def _compute_free_entries(self, role: str, index: int, layer: int | None) -> Tensor:
        """What the operator that the maps begin with writes where no old value goes, for one map of
        a part.
        """
        name = f"{role}.{index}.{layer}"
        if name not in self.free:
            piece, part = self._build_wideners(role, layer)[index], self.before[role, layer].part
            value = split_fused(
                self.source.tensors[role, layer].read().float(), part, self.source.sizes
            )[index]
            self.free[name] = piece(value) - self._apply_axis_maps(
                piece, piece.unflatten_axes(value) * piece.factor, self.begun
            )
        return self.free[name]

    def _constant_gain(self, piece: MapWidener) -> Tensor:
        """Gains that have moved into the readers: the same number everywhere."""
        size = product(piece.signature.outputs[0], self.widening.sizes)
        return torch.full((size,), piece.factor - float(piece.signature.unit))

    def _apply_axis_map(
        self, piece: MapWidener, value: Tensor, span: AxisSpan, matrix: Tensor
    ) -> Tensor:
        at = span.begin
        shape = value.shape
        flat = value.flatten(at, at + span.count - 1)
        space = self.spaces[span.name]
        assert isinstance(space, AxisMap)
        same = space.identity_count(span.read)
        out = torch.tensordot(flat, matrix[same:], ([at], [1])).movedim(-1, at)
        out = torch.cat([flat, out], at) if same else out
        if piece.signature.kind in ("gain", "scale"):
            out = out.index_fill(at, space.silent, 1.0)
        if span.count == 1:
            return out
        sizes = [product((axis,), self.widening.sizes) for axis in piece.axes[at : at + span.count]]
        return out.reshape(*shape[:at], *sizes, *shape[at + span.count :])

    def _find_spans(self, piece: MapWidener) -> list[AxisSpan]:
        """Which map acts on which axes."""
        outputs = len(piece.axes) - len(piece.signature.inputs)
        kind = kind_of(piece.role)
        spans: list[AxisSpan] = []
        for at, axis in enumerate(piece.axes):
            read = at >= outputs
            if self.method.heads == "dense" and axis in HEADS:
                name = "v" if read else kind
                if spans and spans[-1].name == name and spans[-1].read == read:
                    last = spans.pop()
                    spans.append(AxisSpan(last.begin, last.count + 1, name, read))
                else:
                    spans.append(AxisSpan(at, 1, name, read))
            elif axis in GROWABLE_AXES:
                spans.append(
                    AxisSpan(at, 1, "qk" if axis == "dim" and kind in QUERIES else axis, read)
                )
        return spans
