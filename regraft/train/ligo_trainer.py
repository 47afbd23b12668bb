"""One step of fitting LiGO's maps: maps -> weights -> loss, and the gradients back to the maps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn

from .. import distributed, modeling
from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth.ligo import Grower
from ..growth.ligo_options import Ligo
from ..modeling import flops
from . import fsdp
from .fsdp_forward import run_in_forward
from .objectives import IGNORED, Kind, Rows, build_targets, compute_loss_on_targets
from .optimizer import apply_gradients
from .records import LedgerEntry
from .resume import RunState
from .stage import Stage
from .step import micro_batches

CLIP = 1.0  # largest norm of the maps' gradient


class FitCost(TypedDict):
    """What fitting took so far, over all processes."""

    steps: int
    tokens: int  # or images
    flops: int
    seconds: float
    overhead: float  # FLOPs of making weights and their gradients, over those of training on them


class FitRow(FitCost):
    """What is reported after each step."""

    loss: float


class StepFlops(NamedTuple):
    """FLOPs of one step, over all processes."""

    weights: int  # of making the weights from the maps, and of the way back to the maps
    training: int  # of the model's forward and backward pass


class LigoTrainer:
    """The grown model, the maps that make its weights, and the maps' optimiser.

    Attributes:
        grower: makes the grown weights from the maps and the source.
        method: learning rates and schedule.
        model: the grown model. Its parameters hold what the maps make; they are never optimised.
        parts: for each parameter the checkpoint's tensors that it holds.
        optimizer: AdamW over the maps.
        cost: what the steps took so far.
        counts: FLOPs of a step, None before the first.
    """

    def __init__(self, target: Checkpoint, grower: Grower, method: Ligo):
        """Load the grown model.

        Args:
            target: the checkpoint as the maps' start makes it.
            grower: the maps.
            method: how they are trained.
        """
        self.grower, self.method = grower, method
        over = fsdp.build_mesh() if distributed.world_size() > 1 else None
        self.model = fsdp.load_sharded(target, over)
        self.parts = match_parameters(self.model, target)

        # Width maps and depth maps learn at rates of their own.
        groups = [
            {"params": list(grower.spaces.parameters()), "peak": method.lr},
            {"params": list(grower.mixing.parameters()), "peak": method.lr_depth},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=method.lr, weight_decay=method.decay)
        self.cost: FitCost = {
            "steps": 0,
            "tokens": 0,
            "flops": 0,
            "seconds": 0.0,
            "overhead": 0.0,
        }
        self.counts: StepFlops | None = None

    def restore(self, state: RunState) -> None:
        """Take up a state whose maps are in the grower already."""
        state.restore_optimizer(self.grower, self.optimizer)
        if state.ledger:
            # A fitting has no stages: its cost stands where a training run has its ledger.
            self.cost = cast(FitCost, state.ledger[0])
            self.counts = StepFlops(state.costs["weights"], state.costs["training"])

    def record(self, state: RunState) -> None:
        """Put into a state what a checkpoint needs besides the optimiser's moments."""
        assert self.counts is not None
        state.changed = {name for name, _ in self.grower.named_parameters()}
        state.ledger = [cast(LedgerEntry, self.cost)]
        state.costs = self.counts._asdict()

    def step(self, stage: Stage, rows: Rows, step: int, seed: int, micro: int) -> FitRow:
        """Take one step of the maps on `rows`.

        RegraftError when the loss is not finite.

        Args:
            stage: objective and precision.
            rows: the batch of all processes.
            step: number of the step, from 0.
            seed: of the masks.
            micro: rows that go through the model at a time, 0 for all.
        """
        begin = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.lr_factor(step)

        # The weights' graph is kept until the model's gradients are there. So the maps' own
        # forward and backward pass run once a step, however many micro-batches there are.
        if self.counts is None:
            loss, self.counts = self.count_step_flops(stage, rows, seed, micro)
        else:
            weights = self.grow_weights()
            loss = self.backward_loss(stage, rows, seed + step, micro)
            self.backward_maps(weights)
        if not math.isfinite(loss):
            raise RegraftError(
                f"LiGO's loss is {loss} at step {step}: "
                f"lower its lr ({self.method.lr:g}) and run again"
            )

        apply_gradients(self.optimizer, CLIP)
        self.cost["steps"] += 1
        self.cost["tokens"] += rows.tokens
        self.cost["flops"] += sum(self.counts)
        self.cost["seconds"] += time.monotonic() - begin
        self.cost["overhead"] = self.counts.weights / self.counts.training
        return {"loss": loss, **self.cost}

    def lr_factor(self, step: int) -> float:
        """Learning-rate factor: a short linear rise, then linearly down."""
        return min((step + 1) / max(1, self.method.warmup), 1 - step / self.method.steps)

    def count_step_flops(
        self, stage: Stage, rows: Rows, seed: int, micro: int
    ) -> tuple[float, StepFlops]:
        """Gradients of a step under the FLOP counter: its loss and its FLOPs."""
        with flops.build_flop_counter() as forward:
            weights = self.grow_weights()
        with flops.build_flop_counter() as training:
            loss = self.backward_loss(stage, rows, seed, micro)
        with flops.build_flop_counter() as backward:
            self.backward_maps(weights)

        making = forward.get_total_flops() + backward.get_total_flops()
        counts = distributed.all_gather((making, training.get_total_flops()))
        return loss, StepFlops(*(sum(each) for each in zip(*counts, strict=True)))

    def grow_weights(self) -> list[Tensor]:
        """Make the grown weights and copy them into the model.

        Returns:
            The whole weights with their graph, one for each parameter.
        """
        grown = self.grower()
        weights = []
        for parameter, keys in self.parts:
            if len(keys) == 1:
                weights.append(grown[keys[0]])
            else:
                # Experts: one parameter holds the tensors of all of them, one after the other.
                joined = torch.cat([grown[key].flatten() for key in keys])
                weights.append(joined.view(parameter.shape))

        # A copy of the values only: the model's gradients are carried over in `backward_maps`.
        with torch.no_grad():
            for (parameter, _), value in zip(self.parts, weights, strict=True):
                fsdp.local_part(parameter).copy_(fsdp.shard_like(value, parameter))
        return weights

    def backward_loss(self, stage: Stage, rows: Rows, seed: int, micro: int) -> float:
        """Put the loss's gradients into the model's parameters.

        Returns:
            The mean loss over the rows of all processes.
        """
        kind, fast, total = cast(Kind, stage.kind), stage.precision == "bfloat16", 0.0
        inputs, labels = build_targets(
            self.model, kind, rows, torch.Generator().manual_seed(seed), stage.mask_share
        )
        label_count = int((labels != IGNORED).sum())
        device = fsdp.local_part(next(self.model.parameters())).device

        for piece in micro_batches(len(rows), micro):
            given, wanted = inputs[piece].to(device), labels[piece].to(device)
            # Each piece counts by its share of the labels, so that the sum is the mean over the
            # batch. FSDP averages gradients over the processes, hence their number.
            share = distributed.world_size() * int((wanted != IGNORED).sum()) / label_count
            loss = share * run_in_forward(
                self.model, partial(compute_loss_on_targets, self.model, kind, given, wanted, fast)
            )
            loss.backward()
            total += float(loss.detach())
        return sum(distributed.all_gather(total)) / distributed.world_size()

    def backward_maps(self, weights: Sequence[Tensor]) -> None:
        """Carry the parameters' gradients on to the maps, and free them.

        Args:
            weights: what `grow_weights` gave.
        """
        # Each process goes back from its own shards of the weights; the maps' gradients of all
        # processes are then added up.
        shards, grads = [], []
        for (parameter, _), value in zip(self.parts, weights, strict=True):
            if parameter.grad is not None and value.requires_grad:
                shards.append(fsdp.shard_like(value, parameter))
                grads.append(fsdp.local_part(parameter.grad).to(shards[-1].device))
        torch.autograd.backward(shards, grads)
        self.model.zero_grad(set_to_none=True)
        distributed.all_reduce([p.grad for p in self.grower.parameters() if p.grad is not None])


def match_parameters(model: nn.Module, target: Checkpoint) -> list[tuple[nn.Parameter, list[Key]]]:
    """Find which of the checkpoint's tensors each parameter holds.

    Most hold one. Some classes hold the tensors of all experts in one parameter, one after the
    other.

    RegraftError when a class arranges tensors otherwise inside a larger one.

    Returns:
        (parameter, its tensors in their order) for each parameter.
    """
    # Fill every parameter with its own number and convert to the checkpoint's names: the numbers
    # in a tensor say which parameters it comes from.
    named = list(model.named_parameters())
    numbered = {
        name: torch.tensor(float(number)).expand(parameter.shape)
        for number, (name, parameter) in enumerate(named)
    }
    stored = modeling.to_checkpoint_names(model, numbered)
    keys_by_number: dict[int, list[Key]] = {}
    for key, name in target.names.items():
        numbers = stored[name].unique().long().tolist() if name in stored else []
        if len(numbers) != 1:
            raise fused_tensor_error(target, name)
        keys_by_number.setdefault(numbers[0], []).append(key)

    found = []
    for number, keys in keys_by_number.items():
        name, parameter = named[number]
        if len(keys) > 1 or parameter.shape != target.tensors[keys[0]].shape:
            keys = sort_by_position(model, target, name, parameter, keys)
        found.append((parameter, keys))
    return found


def sort_by_position(
    model: nn.Module, target: Checkpoint, name: str, parameter: nn.Parameter, keys: list[Key]
) -> list[Key]:
    """The tensors of one parameter in the order in which it holds them.

    RegraftError when they do not follow each other, each whole and in row-major order.
    """
    # The same trick with the number of every entry: a tensor's entries say where it is.
    entries = torch.arange(parameter.numel()).view(parameter.shape)
    stored = modeling.to_checkpoint_names(model, {name: entries})
    positions = {key: stored[target.names[key]].flatten() for key in keys}
    ordered = sorted(keys, key=lambda key: int(positions[key][0]))
    if not torch.equal(torch.cat([positions[key] for key in ordered]), entries.flatten()):
        raise fused_tensor_error(target, target.names[ordered[0]])
    return ordered


def fused_tensor_error(target: Checkpoint, name: str) -> RegraftError:
    """The error for a tensor that is not one piece of one parameter."""
    return RegraftError(
        f"{target.anatomy.family}'s class keeps '{name}' in pieces of a larger tensor, "
        "which LiGO cannot fit: use another --width-init"
    )
