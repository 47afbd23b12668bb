"""Which layers run and learn in a step: a sub-model, chosen layers, random layers and tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..core.anatomy import find_anatomy
from ..data.images import Images
from ..data.rows import Packed
from ..errors import RegraftError
from ..mixers.gated import GatedMixer
from ..modeling.text_part import find_text_part
from .stage import Stage


class SkippedLayer(nn.Module):
    """Stands for a layer that is left out: its input is its output."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (batch, time, hidden), as they came."""
        return hidden_states


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a stock model, in order; RegraftError when it has no list of them."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in find_text_part(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise RegraftError(
        f"a {type(model).__name__} has no list of its {depth} layers: use layers 'all' and no drops"
    )


def parse_layers(layers: str, depth: int) -> tuple[list[int], list[int]]:
    """(layers that run, layers that learn) of `all`, `bottom:N` or `train:A-B,C,..`.

    Numbers count from 0. RegraftError when a model of this depth has no such layers.
    """
    every = list(range(depth))
    kind, _, text = layers.partition(":")
    if kind == "all":
        return every, every

    if kind == "bottom":
        chosen = list(range(int(text)))
    else:
        # "0-2,5" -> [[0, 2], [5]]: a single layer is a range from itself to itself.
        ranges = [[int(end) for end in piece.split("-")] for piece in text.split(",")]
        chosen = sorted({layer for ends in ranges for layer in range(ends[0], ends[-1] + 1)})
    if not chosen or max(chosen) >= depth:
        raise RegraftError(
            f"layers '{layers}' of a model with layers 0 to {depth - 1}: name layers that it has"
        )
    return (chosen if kind == "bottom" else every), chosen


def frozen_parameter_ids(model: PreTrainedModel, layers: str) -> set[int]:
    """Ids of the parameters that do not learn in a stage with these `layers`.

    These are the parameters of other layers and, for `train:`, all that comes before the stack,
    a tied head included.
    """
    if layers == "all":
        return set()
    modules = list(layer_stack(model))
    _, learning = parse_layers(layers, len(modules))
    layer_of = {
        id(parameter): layer
        for layer, module in enumerate(modules)
        for parameter in module.parameters()
    }
    frozen = {parameter for parameter, layer in layer_of.items() if layer not in learning}

    if layers.startswith("train:"):
        # A tied head is listed once, as the embedding before the stack.
        for parameter in model.parameters():
            if id(parameter) in layer_of:
                break
            frozen.add(id(parameter))
    return frozen


def keep_probability(drop: float, layer: int, depth: int, step: int, steps: int) -> float:
    """How likely a layer stays in a step: progressive layer dropping (arXiv 2010.13369).

    `drop` scaled by 1 - e^(-100 step / steps), their schedule, and growing linearly from the
    first layer, which always stays.

    Args:
        drop: largest probability that a layer is left out.
        layer: from 0.
        depth: number of layers that run.
        step: from 0.
        steps: of the whole stage.
    """
    scheduled = drop * (1 - math.exp(-100 * (step + 1) / steps))
    return 1 - layer / depth * scheduled


@contextmanager
def apply_stage_layers(
    model: PreTrainedModel,
    stage: Stage,
    step: int,
    draws: torch.Generator,
    protected: Tensor | None = None,
    piece: slice = slice(None),
) -> Iterator[str]:
    """Inside, the model is what a stage runs in a step; afterwards it is as it was.

    Layers that are left out pass on what they get. A layer that stayed by chance has its change
    divided by that chance (the paper divides each branch's), unless norms stand in the residual
    stream behind it.

    Args:
        model: the model.
        stage: says what is left out.
        step: number of the step, from 0.
        draws: random numbers of this step, the same for all pieces of its batch.
        protected: tokens of the whole batch that are never left out, (batch, time or less).
        piece: the rows of the batch that run.

    Yields:
        What the FLOPs of the step depend on, as a key.
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
    kept = draw_kept_layers(stage, run, step, draws)
    middle = [layer for layer in middle_layers(run) if layer in kept] if stage.token_drop else []
    dropper = TokenDropper(stage.token_drop, draws, protected, piece)
    rescaled = {} if has_post_norm(model) else kept

    # Rescaling comes first: its hooks must see the shortened output, before tokens are restored.
    with (
        rescale_layers(layers, rescaled),
        drop_tokens(layers, middle, dropper),
        skip_layers(layers, kept),
    ):
        # Layers cost alike when they agree in this: on fewer tokens or not, with gradients of
        # weights or not, with gradients passed through or not.
        alike = Counter((i in middle, i in learn, i > learn[0]) for i in kept)
        most = int(protected.sum(1).max()) if middle and protected is not None else 0
        yield f"{sorted(alike.items())} {most}"


def draw_kept_layers(
    stage: Stage, run: list[int], step: int, draws: torch.Generator
) -> dict[int, float]:
    """The layers that stay in a step, each with the probability that it had to."""
    chances = [
        keep_probability(stage.layer_drop, position, len(run), step, stage.steps)
        for position in range(len(run))
    ]
    drawn = torch.rand(len(run), generator=draws).tolist()
    return {
        layer: chance
        for layer, chance, draw in zip(run, chances, drawn, strict=True)
        if draw < chance
    }


@contextmanager
def skip_layers(layers: nn.ModuleList, kept: Collection[int]) -> Iterator[None]:
    """Inside, layers that are not kept do nothing."""
    skipped = {i: layers[i] for i in range(len(layers)) if i not in kept}
    try:
        for i in skipped:
            layers[i] = SkippedLayer()
        yield
    finally:
        for i, layer in skipped.items():
            layers[i] = layer


@contextmanager
def rescale_layers(layers: nn.ModuleList, chances: Mapping[int, float]) -> Iterator[None]:
    """Inside, each layer's change is divided by the probability that the layer stays."""
    handles = [add_rescaling_hook(layers[i], chance) for i, chance in chances.items() if chance < 1]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_rescaling_hook(layer: nn.Module, chance: float) -> RemovableHandle:
    """Divide a layer's change by a probability, so that its mean is the layer's own change."""

    def scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] + (output - args[0]) / chance

    return layer.register_forward_hook(scale)


@contextmanager
def drop_tokens(layers: nn.ModuleList, middle: list[int], dropper: TokenDropper) -> Iterator[None]:
    """Inside, the middle layers run on fewer tokens; all are back behind the last of them."""
    handles = [
        layers[i].register_forward_pre_hook(dropper.shorten_inputs, with_kwargs=True)
        for i in middle
    ]
    if middle:
        handles.append(layers[middle[-1]].register_forward_hook(dropper.restore_tokens))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def drop_windows(model: PreTrainedModel, chance: float, draws: torch.Generator) -> Iterator[int]:
    """Inside, each gated layer gives only its linear branch with this probability.

    Yields:
        How many layers do.
    """
    gated = [module for module in model.modules() if isinstance(module, GatedMixer)]
    drawn = torch.rand(len(gated), generator=draws)
    without = [module for module, draw in zip(gated, drawn, strict=True) if draw < chance]
    for module in without:
        module.force = "linear"
    try:
        yield len(without)
    finally:
        for module in without:
            module.force = None


def middle_layers(run: list[int]) -> list[int]:
    """The layers that work on fewer tokens: the second half without the last.

    RegraftError when there is none.
    """
    if len(run) < 3:
        raise RegraftError(
            "token_drop needs a layer between the first half and the last: "
            f"{len(run)} layers are too few"
        )
    return run[len(run) // 2 : -1]


def has_post_norm(model: PreTrainedModel) -> bool:
    """Whether norms stand in the residual stream itself, behind each sum."""
    parts = find_anatomy({"model_type": model.config.model_type}).parts.values()
    return any(part.norm and part.writes == "stream" and "{}" in part.name for part in parts)


def find_protected_tokens(rows: Packed | Images, labels: Tensor | None) -> Tensor:
    """Tokens that are never left out: special and masked ones, an image's class token.

    Returns:
        (batch, time), or (batch, 1) for images, bool.
    """
    if isinstance(rows, Images):
        return torch.ones(len(rows), 1, dtype=torch.bool)
    special = torch.isin(rows.input_ids, torch.tensor([*rows.special], dtype=torch.long))
    # Labels of next tokens are one shorter than the rows, and every token has one: no reason to
    # protect it. Labels of masked tokens say which are masked.
    if labels is None or labels.shape != special.shape:
        return special
    return special | (labels != -100)


class TokenDropper:
    """Token dropping (Hou et al., arXiv 2203.13240): some tokens skip the middle layers.

    They are back in the last layer. Which ones is drawn at random, where the paper goes by the
    running loss of each word.
    """

    def __init__(
        self,
        share: float,
        draws: torch.Generator,
        protected: Tensor | None,
        piece: slice = slice(None),
    ):
        """Prepare hooks for one forward pass.

        Args:
            share: of the tokens that skip the middle layers.
            draws: random numbers of the step.
            protected: tokens of the whole batch that never skip, (batch, time or less).
            piece: the rows of the batch that run.
        """
        self.share, self.draws, self.protected, self.piece = share, draws, protected, piece
        self.whole: Tensor | None = None  # what the first middle layer got, (batch, time, hidden)
        self.index = torch.empty(0)  # positions that stay, (batch, kept)

    def shorten_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """A hook before a middle layer: shorten all that runs along the tokens to those kept."""
        if self.whole is None:  # the first middle layer of the pass: draw
            self.whole = args[0]
            self.index = self.sample_kept_positions(*args[0].shape[:2]).to(args[0].device)
        shortened = {name: self.shorten(value) for name, value in kwargs.items()}
        return tuple(map(self.shorten, args)), shortened

    def restore_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A hook behind the last middle layer: all tokens again, (batch, time, hidden)."""
        assert self.whole is not None
        index = self.index[..., None].expand_as(output)
        return self.whole.to(output.dtype).scatter(1, index, output)

    def sample_kept_positions(self, batch: int, time: int) -> Tensor:
        """Positions that stay, in order, (batch, as many in every row)."""
        if self.protected is None:
            protected, piece = torch.zeros(batch, 0, dtype=torch.bool), slice(None)
        else:
            # Drawn for the whole batch, so that its pieces get what they would get together.
            protected, piece = self.protected.cpu(), self.piece
        protected = F.pad(protected, (0, time - protected.shape[1]))

        # All rows lose as many, so no more than the row with the most protected tokens can.
        skipping = min(round(self.share * time), time - int(protected.sum(1).max()))
        order = torch.rand(len(protected), time, generator=self.draws)
        order = order.masked_fill(protected, 2.0).argsort(1)  # protected tokens come last
        return order[piece, skipping:].sort(1).values

    def shorten(self, value: Any) -> Any:
        """An argument of a layer with its time axis shortened, tuples entry by entry.

        Tensors are (batch or 1, time, ..) or attention masks (.., .., time, time). What has no
        axis along the tokens stays.
        """
        assert self.whole is not None
        time = self.whole.shape[1]
        if isinstance(value, tuple):
            return tuple(map(self.shorten, value))
        if not torch.is_tensor(value) or value.ndim < 2:
            return value
        for axis in (1,) if value.ndim < 4 else (2, 3):
            if value.shape[axis] == time:
                value = self._gather(value, axis)
        return value

    def _gather(self, value: Tensor, axis: int) -> Tensor:
        """The kept positions of a tensor along an axis, by row: each row keeps its own."""
        batch = self.index.shape[0]
        value = value.expand(batch, *value.shape[1:])
        shape = [batch] + [-1 if at == axis else 1 for at in range(1, value.ndim)]
        wide = [-1 if at in (0, axis) else size for at, size in enumerate(value.shape)]
        return value.gather(axis, self.index.view(shape).expand(wide))
