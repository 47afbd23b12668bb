"""Depth in LiGO: every layer of the target begins as a weighted sum of the source's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.anatomy import Key, Part, PlacedPart
from ..core.fused import fused_maps, split_fused
from ..core.shapes import Float
from ..errors import RegraftError
from .depth import LayerOrigin
from .identity_layer import IdentityLayer
from .norm_folding import norm_before, reads_stream
from .widened import MapWidener, map_specs
from .widening import Widening

# Entries of one map in all layers that are in memory at once when a fitted model is written.
MAX_STACKED_ENTRIES = 1 << 26


def module_names(part: Part, role: str) -> list[str]:
    """The kinds of module that a layer's tensor holds, such as `attn_q`; one w belongs to each."""
    return [one.role.rpartition(".")[0].replace(".", "_") for one in fused_maps(part, role)]


def build_mixing(
    widening: Widening,
    placed: Mapping[Key, PlacedPart],
    order: Sequence[LayerOrigin],
    blur: float,
    generator: torch.Generator,
) -> dict[str, nn.Parameter]:
    """w, (target layers, source layers), of every kind of module; none without new layers.

    RegraftError for new layers that are no mixture of old ones.

    Args:
        widening: gives the source and its family.
        placed: every parameter of the source.
        order: what each layer of the target is at first.
        blur: how much of the other layers is mixed in.
        generator: of the other layers' shares.
    """
    source = widening.source
    if [layer.source for layer in order] == list(range(source.layers)):
        return {}
    identity_layer = IdentityLayer(source, placed)
    if identity_layer.post_norm and any(layer.new for layer in order):
        raise RegraftError(
            f"idle layers of {widening.family.family} hand on the norm before them, which is no"
            " mixture of layers: use depth stack or interpolate"
        )

    # One w per kind of module (queries, values, a norm, ..), which a weight and its bias share.
    mixing: dict[str, nn.Parameter] = {}
    for role in dict.fromkeys(role for role, layer in placed if layer is not None):
        # Outputs of layers that start as the identity are zero: their row of w is too.
        silenced = identity_layer.silences(role)
        start = torch.zeros(len(order), source.layers)
        for i, layer in enumerate(order):
            start[i, layer.source] = 0.0 if layer.new and silenced else 1.0

        has_source = start.sum(1, keepdim=True) > 0
        for name in module_names(placed[role, 0].part, role):
            if name not in mixing:
                noise = torch.rand(start.shape, generator=generator)
                blurred = start + blur * noise * has_source
                total = blurred.sum(1, keepdim=True).clamp(min=1.0)
                mixing[name] = nn.Parameter(blurred / total)
    return mixing


class SourceLayers:
    """Reads the maps of the source's tensors and mixes them over layers, still at their old size.

    All maps are float32, have one dimension per axis and are multiplied by the factor that their
    widening asks for.

    Args:
        widening: gives the source and the factors.
        placed: every parameter of the source.
        folds_norms: whether gains of norms are multiplied into the maps that read them.
    """

    # Maps of a role in all layers, (source layers, ...) each, once they are held in memory.
    stacks: dict[str, list[Tensor]]

    def __init__(self, widening: Widening, placed: Mapping[Key, PlacedPart], folds_norms: bool):
        self.widening, self.placed, self.folds_norms = widening, placed, folds_norms
        self.source = widening.source
        self.stacks = {}

    def hold_in_memory(self) -> None:
        """Keep all maps in memory from now on."""
        for role in dict.fromkeys(role for role, _ in self.placed):
            self.stacks[role] = self._stack(role)

    def wideners(self, role: str, layer: int | None) -> list[MapWidener]:
        """What widens each map of a tensor."""
        specs = map_specs(self.placed[role, layer].part, role, layer)
        return [MapWidener(self.widening, spec) for spec in specs]

    def split(self, role: str, layer: int | None) -> list[Float[Tensor, "*axes"]]:
        """The maps of one tensor as stored, (outputs, inputs), float32."""
        value = self.source.tensors[role, layer].read().float()
        return split_fused(value, self.placed[role, layer].part, self.source.sizes)

    def mix(
        self, role: str, layer: int | None, mixing: nn.ParameterDict
    ) -> list[Float[Tensor, "*axes"]]:
        """The maps of a role for one layer of the target.

        Args:
            role: the tensor's role.
            layer: the layer of the target, None outside the stack.
            mixing: w by `module_names`, (target layers, source layers); without one for the role
                the layer is the source's of the same number.
        """
        names = [] if layer is None else module_names(self.placed[role, 0].part, role)
        if layer is None or names[0] not in mixing:
            if role in self.stacks:
                return [stack[layer or 0] for stack in self.stacks[role]]
            return self._read(role, layer)

        # All source layers in one product where they fit in memory, else one after another.
        rows = [mixing[name][layer] for name in names]
        entries = self.source.layers * self.source.tensors[role, 0].size
        if role in self.stacks or entries <= MAX_STACKED_ENTRIES:
            stacks = self.stacks.get(role) or self._stack(role)
            return [torch.tensordot(row, stack, 1) for row, stack in zip(rows, stacks, strict=True)]
        return self._mix_one_by_one(role, torch.stack(rows))

    def _mix_one_by_one(
        self, role: str, rows: Float[Tensor, "maps layers"]
    ) -> list[Float[Tensor, "*axes"]]:
        """Mixed maps with one layer of the source in memory at a time; no gradient flows to w."""
        totals: list[Tensor] = []
        for layer, shares in enumerate(rows.T.tolist()):
            maps = self._read(role, layer)
            values = [share * value for share, value in zip(shares, maps, strict=True)]
            if totals:
                for total, value in zip(totals, values, strict=True):
                    total.add_(value)
            else:
                totals = values
        return totals

    def _read(self, role: str, layer: int | None) -> list[Float[Tensor, "*axes"]]:
        """The maps of one tensor of the source."""
        wideners = self.wideners(role, layer)
        values = self.split(role, layer)
        return [self._scale(one, value) for one, value in zip(wideners, values, strict=True)]

    def _scale(self, widener: MapWidener, value: Float[Tensor, "*old"]) -> Float[Tensor, "*new"]:
        """A map with one dimension per axis, as it acts, times its factor and a folded gain."""
        value = widener.unflatten_axes(value)
        if widener.signature.unit:
            value = value + 1

        if self.folds_norms and reads_stream(widener.part):
            norm = norm_before(widener.role, widener.part)
            key = (norm, None if (norm, None) in self.placed else widener.spec.layer)
            gain = self.source.tensors[key].read().float()
            value = value * (gain + 1 if self.placed[key].part.axes.unit else gain)
        return value * widener.factor

    def _stack(self, role: str) -> list[Float[Tensor, "layers ..."]]:
        """The maps of a role in all layers of the source."""
        layers: list[int | None] = [*range(self.source.layers)]
        if (role, None) in self.placed:
            layers = [None]
        maps = [self._read(role, layer) for layer in layers]
        return [torch.stack(list(column)) for column in zip(*maps, strict=True)]
