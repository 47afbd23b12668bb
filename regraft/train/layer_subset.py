"""Which layers run and learn in a step: a sub-model, layers trained alone, layers and tokens left out at random."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.anatomy import find_anatomy
from ..data.packing import Images, Packed
from ..errors import RegraftError
from ..mixers.gated import GatedMixer
from .stage import Stage


class SkippedLayer(nn.Module):
    """Stands for a layer that is left out: its input is its output."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (batch, time, hidden), as they came."""
        return hidden_states


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a stock model, in order."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise RegraftError(
        f"a {type(model).__name__} has no list of its {depth} layers: use layers 'all' and no drops"
    )


def parse_layers(layers: str, depth: int) -> tuple[list[int], list[int]]:
    """(layers that run, layers that learn) of `all`, `bottom:N` or `train:A-B,C,..`, which count from 0.

    RegraftError when the model has no such layers.
    """
    every = list(range(depth))
    kind, _, place = layers.partition(":")
    if kind == "all":
        return every, every
    if kind == "bottom":
        wanted = list(range(int(place)))
    else:
        bounds = [[int(end) for end in piece.split("-")] for piece in place.split(",")]
        wanted = sorted({layer for ends in bounds for layer in range(ends[0], ends[-1] + 1)})
    if not wanted or max(wanted) >= depth:
        raise RegraftError(
            f"layers '{layers}' of a model with layers 0 to {depth - 1}: name layers that it has"
        )
    return (wanted if kind == "bottom" else every), wanted


def frozen_parameter_ids(model: PreTrainedModel, layers: str) -> set[int]:
    """Identities of the parameters that do not learn: other layers, and for `train:` all that comes before the stack,
    a tied head included.
    """
    if layers == "all":
        return set()
    modules = list(layer_stack(model))
    _, learning = parse_layers(layers, len(modules))
    inside = {
        id(parameter): layer
        for layer, module in enumerate(modules)
        for parameter in module.parameters()
    }
    fixed = {parameter for parameter, layer in inside.items() if layer not in learning}
    if layers.startswith("train:"):
        for parameter in model.parameters():
            if id(parameter) in inside:
                break
            fixed.add(id(parameter))
    return fixed


def keep_probability(drop: float, layer: int, depth: int, step: int, steps: int) -> float:
    """Progressive layer dropping (Zhang & He, arXiv 2010.13369): how likely a layer stays in a step, both from 0.

    The share (1 - drop) e^(-100 t / steps) + drop of their schedule, growing from the first layer, which always stays.
    """
    lost = drop * (1 - math.exp(-100 * (step + 1) / steps))
    return 1 - layer / depth * lost


@contextmanager
def apply_stage_layers(
    model: PreTrainedModel,
    stage: Stage,
    step: int,
    draws: torch.Generator,
    held: Tensor | None = None,
    piece: slice = slice(None),
) -> Iterator[str]:
    """Inside, only what a stage runs in a step is there; yields what its FLOPs depend on.

    `held` (batch, time or less): tokens that are never left out; `piece`: the rows of that batch that run. Layers that
    are left out pass on what they get. A layer that stayed by chance has its change divided by that chance (the paper
    divides each branch's), unless norms stand in the residual stream behind it. Everything is as it was afterwards.
    """
    if stage.window_drop:
        with drop_windows(model, stage.window_drop, draws) as count:
            yield f"{count} without a window"
        return
    if stage.layers == "all" and not stage.layer_drop and not stage.token_drop:
        yield "all"
        return
    layers = layer_stack(model)
    run, learn = parse_layers(stage.layers, len(layers))
    chances = [
        keep_probability(stage.layer_drop, at, len(run), step, stage.steps)
        for at in range(len(run))
    ]
    thrown = torch.rand(len(run), generator=draws).tolist()
    kept = {
        layer: chance
        for layer, chance, draw in zip(run, chances, thrown, strict=True)
        if draw < chance
    }
    middle = [layer for layer in middle_layers(run) if layer in kept] if stage.token_drop else []
    handles = (
        []
        if has_post_norm(model)
        else [add_rescaling_hook(layers[i], chance) for i, chance in kept.items() if chance < 1]
    )
    if middle:
        aside = TokenDropper(stage.token_drop, draws, held, piece)
        handles += [
            layers[i].register_forward_pre_hook(aside.shorten_inputs, with_kwargs=True)
            for i in middle
        ]
        handles.append(layers[middle[-1]].register_forward_hook(aside.restore_tokens))
    away = {i: layers[i] for i in range(len(layers)) if i not in kept}
    try:
        for i in away:
            layers[i] = SkippedLayer()
        alike = Counter((i in middle, i in learn, i > learn[0]) for i in kept)
        yield f"{sorted(alike.items())} {int(held.sum(1).max()) if middle and held is not None else 0}"
    finally:
        for i, layer in away.items():
            layers[i] = layer
        for handle in handles:
            handle.remove()


@contextmanager
def drop_windows(model: PreTrainedModel, chance: float, draws: torch.Generator) -> Iterator[int]:
    """Inside, each gated layer gives only its linear branch with this probability; yields how many do."""
    gated = [module for module in model.modules() if isinstance(module, GatedMixer)]
    off = [
        module
        for module, draw in zip(gated, torch.rand(len(gated), generator=draws), strict=True)
        if draw < chance
    ]
    for module in off:
        module.force = "linear"
    try:
        yield len(off)
    finally:
        for module in off:
            module.force = None


def middle_layers(run: list[int]) -> list[int]:
    """The layers that work on fewer tokens: the second half without the last. RegraftError when there is none."""
    if len(run) < 3:
        raise RegraftError(
            f"token_drop needs a layer between the first half and the last: {len(run)} layers are too few"
        )
    return run[len(run) // 2 : -1]


def has_post_norm(model: PreTrainedModel) -> bool:
    """Whether norms stand in the residual stream itself, behind each sum."""
    parts = find_anatomy({"model_type": model.config.model_type}).parts.values()
    return any(part.norm and part.writes == "stream" and "{}" in part.name for part in parts)


def add_rescaling_hook(layer: nn.Module, chance: float) -> Any:
    """Divide a layer's change by the probability that it stays, so that its mean is the layer's own."""

    def scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] + (output - args[0]) / chance

    return layer.register_forward_hook(scale)


def find_protected_tokens(rows: Packed | Images, labels: Tensor | None) -> Tensor:
    """Tokens that are never left out: special and masked ones, an image's class token; (batch, time or 1)."""
    if isinstance(rows, Images):
        return torch.ones(len(rows), 1, dtype=torch.bool)
    special = torch.isin(rows.input_ids, torch.tensor([*rows.special], dtype=torch.long))
    return (
        special if labels is None or labels.shape != special.shape else special | (labels != -100)
    )


class TokenDropper:
    """Token dropping (Hou et al., arXiv 2203.13240): a share of the tokens skips the middle layers and is back in the
    last. Which ones is drawn at random, where the paper goes by the running loss of each word.
    """

    def __init__(
        self, share: float, draws: torch.Generator, held: Tensor | None, piece: slice = slice(None)
    ):
        self.share, self.draws, self.held, self.piece = share, draws, held, piece
        self.whole: Tensor | None = None
        self.index = torch.empty(0)

    def shorten_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """What a middle layer gets: everything that runs along the tokens shortened to those that stay."""
        if self.whole is None:
            self.whole, self.index = (
                args[0],
                self.sample_kept_positions(*args[0].shape[:2]).to(args[0].device),
            )
        return tuple(map(self.shorten, args)), {
            name: self.shorten(value) for name, value in kwargs.items()
        }

    def restore_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the last middle layer: all tokens again, (batch, time, hidden)."""
        assert self.whole is not None
        return self.whole.to(output.dtype).scatter(
            1, self.index[..., None].expand_as(output), output
        )

    def sample_kept_positions(self, batch: int, time: int) -> Tensor:
        """Positions that stay, in order, (batch, as many in every row); drawn for the whole of a split batch."""
        held = torch.zeros(batch, 0, dtype=torch.bool) if self.held is None else self.held.cpu()
        held = F.pad(held, (0, time - held.shape[1]))
        piece = self.piece if self.held is not None else slice(None)
        away = min(round(self.share * time), time - int(held.sum(1).max()))
        order = torch.rand(len(held), time, generator=self.draws).masked_fill(held, 2.0).argsort(1)
        return order[piece, away:].sort(1).values

    def shorten(self, value: Any) -> Any:
        """A tensor along the tokens, (batch or 1, time, ..) or an attention mask (.., time, time), shortened."""
        assert self.whole is not None
        batch, time = self.whole.shape[:2]
        if isinstance(value, tuple):
            return tuple(map(self.shorten, value))
        if not torch.is_tensor(value) or value.ndim < 2:
            return value
        for axis in (1,) if value.ndim < 4 else (2, 3):
            if value.shape[axis] == time:
                value = value.expand(batch, *value.shape[1:])
                shape = [batch, *(-1 if at == axis else 1 for at in range(1, value.ndim))]
                wide = [-1 if at in (0, axis) else size for at, size in enumerate(value.shape)]
                value = value.gather(axis, self.index.view(shape).expand(wide))
        return value
