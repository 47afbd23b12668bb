"""A trial: a few steps of training on random input, in memory only, and what they did to every entry of a model."""

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
from ..errors import RegraftError
from ..growth.widened import fused_maps, split_fused
from ..growth.widening import kind_of, tensor_axes

ROWS, LENGTH = 2, 64
RATE = 0.02  # of a step, relative to each tensor's own root mean square
ZERO_TENSOR_RMS = 0.02  # stands for that of a tensor of zeros
LOOKED_UP = ("pos", "type")


@dataclass(frozen=True)
class ProbedMap:
    """One map, gain or bias of a tensor, axis by axis, before and after the steps; the first `outputs` are written.

    `reached`: entries that had a gradient. `judged`: entries that the batch could have reached.
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
    """Every tensor of a checkpoint after a few steps, taken apart by its signature."""
    model = modeling.materialize(checkpoint)
    ids, masks = train_steps(model, checkpoint, steps, seed)
    with torch.no_grad():
        reached = modeling.to_checkpoint_names(model, masks)
        after = modeling.to_checkpoint_names(
            model, {name: p.detach() for name, p in model.named_parameters()}
        )
    sizes = checkpoint.sizes
    for (role, layer), spot in checkpoint.anatomy.place(checkpoint.config).items():
        if spot.name not in after:
            raise RegraftError(
                f"'{spot.name}' is no parameter of the running model: report this table"
            )
        used = spot.name in reached
        mask = reached[spot.name] if used else torch.zeros(spot.shape, dtype=torch.bool)
        tensors = (checkpoint.tensors[role, layer].read().float(), after[spot.name], mask)
        parts = [split_fused(tensor, spot.part, sizes) for tensor in tensors]
        for (name, signature, output), *values in zip(
            fused_maps(spot.part, role), *parts, strict=True
        ):
            axes = tensor_axes(signature, output)
            before, moved, hit = (
                value.reshape([product((axis,), sizes) for axis in axes]) for value in values
            )
            cancelled = (
                signature.kind == "bias" and kind_of(name) == "k"
            )  # by softmax, rotary positions aside
            judged = (
                reachable_entries(hit, axes, spot.part, ids)
                if used and not cancelled
                else torch.zeros_like(hit)
            )
            yield ProbedMap(
                spot.name, name, layer, spot.part, axes, len(output), before, moved, hit, judged
            )


def train_steps(
    model: PreTrainedModel, checkpoint: Checkpoint, steps: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take steps on one batch; (token ids in it, entries that had a gradient by parameter that is used).

    Every tensor moves by the same share of its own spread, along its gradient: what waits behind zeros wakes up, and
    rounding errors of gradients stay as small as they are beside them.
    """
    given = random_batch(checkpoint, seed)
    masks: dict[str, Tensor] = {}
    for _ in range(steps):
        with torch.enable_grad():
            value = compute_loss(model, given, checkpoint.anatomy.causal, seed)
        if not bool(value.isfinite()):
            raise RegraftError(
                f"'{checkpoint.path}' gives a loss of {value.item()} on random input: mend its weights"
            )
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                hit = parameter.grad != 0
                masks[name] = masks[name] | hit if name in masks else hit
                parameter.data = parameter.data - RATE * nonzero_rms(
                    parameter.data, ZERO_TENSOR_RMS
                ) * normalize_gradient(parameter.grad)
                parameter.grad = None
    ids = given.get("input_ids", torch.empty(0, dtype=torch.long))
    return ids.unique(), masks


def nonzero_rms(value: Tensor, otherwise: float) -> float:
    """Root mean square of the entries that are not zero."""
    return float(value.norm() / value.count_nonzero().clamp(min=1).sqrt()) or otherwise


def normalize_gradient(gradient: Tensor) -> Tensor:
    """A gradient in units of its own root mean square, outliers cut off."""
    return (gradient / nonzero_rms(gradient, 1.0)).clamp(-3, 3)


def random_batch(checkpoint: Checkpoint, seed: int) -> dict[str, Tensor]:
    """Random tokens, none of them special, or random pixels."""
    if checkpoint.anatomy.inputs == "pixels":
        return modeling.random_inputs(checkpoint, ROWS, seed=seed)
    special: set[int | None] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = checkpoint.anatomy.host_config(checkpoint.config).get(key)
        special.update(value if isinstance(value, list) else [value])
    plain = torch.tensor(
        [token for token in range(checkpoint.sizes["vocab"]) if token not in special]
    )
    length = min(LENGTH, checkpoint.sizes.get("pos", 2 * LENGTH) // 2)
    drawn = torch.randint(len(plain), (ROWS, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": plain[drawn]}


def compute_loss(
    model: PreTrainedModel, given: dict[str, Tensor], causal: bool, seed: int
) -> Tensor:
    """Of the next token (the first after the last), or the distance of every output from random targets."""
    if causal:
        logits = model(**given, use_cache=False).logits.float()
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), given["input_ids"].roll(-1, 1).flatten()
        )
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for value in model(**given).values():
        for output in value if isinstance(value, tuple) else (value,):
            scaled = output.float() / nonzero_rms(output.detach(), 1.0)
            total = (
                total + (scaled - torch.randn(output.shape, generator=generator)).square().mean()
            )
    return total


def reachable_entries(reached: Tensor, axes: Sequence[str], part: Part, ids: Tensor) -> Tensor:
    """Entries that the batch could reach: rows that were looked up, experts that were chosen."""
    judged = torch.full_like(reached, "{e}" not in part.name or bool(reached.any()))
    for position, axis in enumerate(axes):
        if axis == "vocab":
            used = torch.zeros(reached.shape[position], dtype=torch.bool).index_fill(0, ids, True)
        elif axis in LOOKED_UP:
            used = flatten_by_axis(reached, position).any(1)
        else:
            continue
        judged &= used.reshape([-1 if at == position else 1 for at in range(reached.ndim)])
    return judged


def flatten_by_axis(value: Tensor, position: int) -> Tensor:
    """(units of one axis, the rest)."""
    return value.movedim(position, 0).flatten(1) if value.ndim > 1 else value[:, None]
