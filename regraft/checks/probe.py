"""A few steps of training in memory, on random input: what they did to every entry of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import modeling
from ..core.anatomy import Part
from ..core.axes import product
from ..core.checkpoint import Checkpoint
from ..core.fused import fused_maps, split_fused
from ..errors import RegraftError
from ..growth.widening import kind_of, tensor_axes

ROWS, LENGTH = 2, 64
RATE = 0.02  # of a step, relative to each tensor's own root mean square
ZERO_TENSOR_RMS = 0.02  # stands for that of a tensor of zeros
# Axes of tables beside `vocab`, of which a batch uses some rows.
LOOKED_UP = ("pos", "place", "type", "bucket")


@dataclass(frozen=True)
class ProbedMap:
    """One map, gain or bias of a model, axis by axis, before and after the steps.

    A tensor that holds several maps, such as fused queries, keys and values, gives one of each.

    Attributes:
        name: of the tensor in the model's state dict.
        role: of the map, such as `attn.q.weight`.
        layer: None outside the layers.
        part: the tensor's declaration in the anatomy.
        axes: of all values below, such as `["kv", "dim", "hidden"]`.
        outputs: how many of the axes, counted from the first, are written.
        before: values before the steps.
        after: values after them.
        reached: entries that had a gradient.
        judged: entries that the batch could have reached.
    """

    name: str
    role: str
    layer: int | None
    part: Part
    axes: list[str]
    outputs: int
    before: Tensor
    after: Tensor
    reached: Tensor
    judged: Tensor


def iter_probed_maps(checkpoint: Checkpoint, steps: int, seed: int) -> Iterator[ProbedMap]:
    """Every map of a checkpoint after a few steps; no file is changed.

    Args:
        checkpoint: the model.
        steps: of training on one random batch.
        seed: of the batch.
    """
    model = modeling.materialize(checkpoint)
    token_ids, masks = train_steps(model, checkpoint, steps, seed)
    # A tied tensor has two names, of which the file has one.
    named = dict(model.named_parameters(remove_duplicate=False))
    hits = {id(named[name]): mask for name, mask in masks.items()}
    masks = {name: hits[id(value)] for name, value in named.items() if id(value) in hits}
    with torch.no_grad():
        moved = {name: value.detach() for name, value in named.items()}
        reached = modeling.to_checkpoint_names(model, masks, checkpoint.anatomy)
        after = modeling.to_checkpoint_names(model, moved, checkpoint.anatomy)

    buffers = modeling.to_checkpoint_names(model, dict(model.named_buffers()), checkpoint.anatomy)
    sizes = checkpoint.sizes
    for (role, layer), placed in checkpoint.anatomy.place(checkpoint.config).items():
        name, part = placed.name, placed.part
        if placed.shape == ():  # a constant that the class stores
            continue
        if name in buffers:  # a constant that is stored, but does not learn
            continue
        if name not in after:
            raise RegraftError(f"'{name}' is no parameter of the running model: report this table")
        is_used = name in reached
        mask = reached[name] if is_used else torch.zeros(placed.shape, dtype=torch.bool)

        # Each of the three tensors is taken apart into the same maps.
        tensors = (checkpoint.tensors[role, layer].read().float(), after[name], mask)
        split = [split_fused(tensor, part, sizes) for tensor in tensors]
        for (map_role, signature, output), *values in zip(
            fused_maps(part, role), *split, strict=True
        ):
            axes = tensor_axes(signature, output)
            shape = [product((axis,), sizes) for axis in axes]
            old, new, hit = (value.reshape(shape) for value in values)

            # Softmax cancels what all keys have in common: a key's bias never gets a gradient,
            # except through rotary positions.
            is_key_bias = signature.kind == "bias" and kind_of(map_role) == "k"
            if is_used and not is_key_bias:
                judged = reachable_entries(hit, axes, part, token_ids)
            else:
                judged = torch.zeros_like(hit)
            yield ProbedMap(name, map_role, layer, part, axes, len(output), old, new, hit, judged)


def train_steps(
    model: PreTrainedModel, checkpoint: Checkpoint, steps: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take steps on one batch.

    Every tensor moves by the same share of its own spread, along its gradient: what waits behind
    zeros wakes up, and rounding errors of gradients stay as small as they are beside them.

    Args:
        model: changed in place.
        checkpoint: what the model was loaded from.
        steps: how many.
        seed: of the batch.

    Returns:
        The token ids of the batch, and for every parameter in use the entries that had a gradient.
    """
    inputs = random_batch(checkpoint, seed)
    masks: dict[str, Tensor] = {}
    for _ in range(steps):
        with torch.enable_grad():
            predicts = checkpoint.anatomy.continues_text(checkpoint.config)
            loss = compute_loss(model, inputs, predicts, seed)
        if not bool(loss.isfinite()):
            raise RegraftError(
                f"'{checkpoint.path}' gives a loss of {loss.item()} on random input: "
                "mend its weights"
            )
        loss.backward()

        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            hit = parameter.grad != 0
            masks[name] = masks[name] | hit if name in masks else hit
            scale = RATE * nonzero_rms(parameter.data, ZERO_TENSOR_RMS)
            # A new tensor, not in place: weights may be mapped from the file.
            parameter.data = parameter.data - scale * normalize_gradient(parameter.grad)
            parameter.grad = None

    rows = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    token_ids = torch.empty(0, dtype=torch.long) if rows is None else rows
    return token_ids.unique(), masks


def nonzero_rms(value: Tensor, otherwise: float) -> float:
    """Root mean square of the entries that are not zero; `otherwise` if all are."""
    return float(value.norm() / value.count_nonzero().clamp(min=1).sqrt()) or otherwise


def normalize_gradient(gradient: Tensor) -> Tensor:
    """A gradient in units of its own root mean square, outliers cut off."""
    return (gradient / nonzero_rms(gradient, 1.0)).clamp(-3, 3)


def random_batch(checkpoint: Checkpoint, seed: int) -> dict[str, Tensor]:
    """Random tokens, none of them special, random pixels or sound; arguments of the model."""
    if checkpoint.anatomy.inputs in ("pixels", "masked pixels", "spectrogram"):
        return modeling.random_inputs(checkpoint, ROWS, seed=seed)

    if checkpoint.anatomy.inputs == "texts and images":
        length = min(LENGTH, checkpoint.sizes["pos"])
        return modeling.random_inputs(checkpoint, ROWS, length, seed)

    # Special tokens may be treated otherwise, such as padding, whose embedding gets no gradient.
    config = checkpoint.anatomy.host_config(checkpoint.config)
    text = checkpoint.anatomy.text_config(checkpoint.config)
    special: set[int | None] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", *modeling.IMAGE_TOKENS):
        value = config.get(key, text.get(key))
        special.update(value if isinstance(value, list) else [value])
    plain = [token for token in range(checkpoint.sizes["vocab"]) if token not in special]

    length = min(LENGTH, checkpoint.sizes.get("pos", 2 * LENGTH) // 2)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(plain), (ROWS, length), generator=generator)
    ids = torch.tensor(plain)[drawn]
    if checkpoint.anatomy.inputs not in modeling.PAIRED:
        return {"input_ids": ids}
    read = modeling.draw_encoder_inputs(checkpoint, ids, generator)
    return read | {"decoder_input_ids": ids}


def compute_loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], causal: bool, seed: int
) -> Tensor:
    """Next-token loss, or the distance of every output from random targets.

    Args:
        model: what is run.
        inputs: its arguments.
        causal: whether it predicts the next token; the last token's next one is the first.
        seed: of the random targets.
    """
    if causal:
        logits = model(**inputs, use_cache=False).logits.float()
        targets = inputs["input_ids"].roll(-1, 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for value in model(**inputs).values():
        outputs = value if isinstance(value, tuple) else (value,)
        for output in outputs:
            if not torch.is_tensor(output) or not output.requires_grad:
                continue  # a cache, or numbers of places
            # Scaled, so that every output counts alike.
            scaled = output.float() / nonzero_rms(output.detach(), 1.0)
            target = torch.randn(output.shape, generator=generator)
            total = total + (scaled - target).square().mean()
    return total


def reachable_entries(
    reached: Tensor, axes: Sequence[str], part: Part, token_ids: Tensor
) -> Tensor:
    """Entries that the batch could reach: rows that were looked up, experts that were chosen.

    Args:
        reached: entries that had a gradient, one axis each for `axes`.
        axes: of the map.
        part: the tensor's declaration.
        token_ids: of the batch.
    """
    is_expert = "{e}" in part.name
    judged = torch.full_like(reached, not is_expert or bool(reached.any()))
    for position, axis in enumerate(axes):
        if axis == "vocab":
            used = torch.zeros(reached.shape[position], dtype=torch.bool)
            used = used.index_fill(0, token_ids, True)
        elif axis in LOOKED_UP:
            used = flatten_by_axis(reached, position).any(1)
        else:
            continue
        judged &= align_to_axis(used, position, reached.ndim)
    return judged


def align_to_axis(units: Tensor, position: int, ndim: int) -> Tensor:
    """One value per unit of an axis, in a shape that broadcasts over all axes."""
    return units.reshape([-1 if axis == position else 1 for axis in range(ndim)])


def flatten_by_axis(value: Tensor, position: int) -> Tensor:
    """(units of one axis, the rest)."""
    return value.movedim(position, 0).flatten(1) if value.ndim > 1 else value[:, None]
