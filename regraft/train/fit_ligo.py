"""Fitting LiGO's maps: a few training steps of the grown model in which only the maps learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import distributed, modeling
from ..core import lineage
from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint
from ..data.corpus import Text
from ..data.packing import shuffled_indices
from ..errors import RegraftError
from ..growth.ligo import Grower
from ..growth.ligo_maps import Ligo
from ..growth.sizes_to_steps import Growth
from ..growth.steps.bridge import Bridge
from ..growth.steps.ligo import Learned
from ..modeling import flops
from ..progress import Ticker
from . import fsdp
from .fsdp_forward import run_in_forward
from .loop import reduce_step_status
from .objectives import IGNORED, Data, Kind, Rows, build_targets, compute_loss_on_targets
from .resume import RunState, list_checkpoints, load_state, lock_run, save_state
from .session import load_stage_rows
from .signals import SigtermHandler
from .stage import Stage
from .step import micro_batches

CLIP = 1.0
RUN: dict[str, Any] = {"batch": 16, "length": 256, "micro": None, "precision": "float32"}
ZERO_STEPS = '{"steps": 0}'
Progress = Callable[[int, int, dict[str, float]], None]


def fit_maps(
    source: Checkpoint,
    growth: Growth,
    method: Ligo,
    stage: Stage,
    rows: Data,
    seed: int = 0,
    micro: int | None = None,
    progress: Progress = lambda step, steps, row: None,
    out: Path | None = None,
    save_seconds: float = 60.0,
) -> Learned:
    """Learn how to grow `source` to the sizes of `growth`; the step that does it, behind the bridge if there is one.

    `stage` gives the objective (next, mask or image), the rows of a step and their precision, `method` the steps and
    learning rates. The grown weights are made once a step, also when `micro` rows at a time go through the model. The
    step's `cost` holds steps, tokens (or images), flops, seconds and `overhead`: FLOPs of making the weights and
    their gradients, as a share of a plain training step's. Maps, moments and cost are kept in folder `out` every
    `save_seconds` and at the end: called again with the same arguments it goes on from there, with the losses that it
    would have had, bit for bit in as many processes. RegraftError when nothing grows, when the data is of another kind
    than the objective, when a loss is not finite, and when `out` holds another fitting.
    """
    if growth.bridge:
        source = Bridge()(source)
    sizes = growth.with_target_sizes(source).sizes
    if all(size is None for size in sizes.values()):
        raise RegraftError(
            f"nothing to grow in '{source.origin}': give sizes to LiGO, such as hidden or layers"
        )
    learned = Learned(**sizes, method=method, seed=seed)
    grower = learned.build_grower(source)
    made = LigoTrainer(learned(source), grower.cache_source(), method)
    if stage.batch % distributed.world_size():
        raise RegraftError(
            f"a batch of {stage.batch} does not split over {distributed.world_size()} processes: give a multiple as batch"
        )
    count = stage.batch * method.steps
    order = shuffled_indices(len(rows), count, seed) if count else torch.empty(0, dtype=torch.long)
    facts: dict[str, Any] = {"sizes": sizes, "method": asdict(method), "stage": asdict(stage)}
    facts |= {"seed": seed, "micro": micro, "rows": len(rows)}
    if out:
        facts["source"] = distributed.on_rank0(lambda: lineage.fingerprint(source, 0))
    with (
        SigtermHandler() if out else nullcontext() as stopping,
        lock_run(out) if out else nullcontext(),
    ):
        state = made.restore(load_state(out, grower, facts) if out else RunState())
        saved = time.monotonic()
        while state.step < method.steps:
            picked = rows[order[state.step * stage.batch : (state.step + 1) * stage.batch]]
            row = made.step(stage, picked, state.step, seed, micro or 0)
            state.step += 1
            progress(state.step, method.steps, row)
            if out is None or stopping is None:
                continue
            _, stop, due = reduce_step_status(
                0.0, stopping.asked, time.monotonic() - saved > save_seconds
            )
            if due or stop or state.step == method.steps:
                save_state(out, grower, made.optimizer, made.record_state(state), facts)
                saved = time.monotonic()
            if stop and state.step < method.steps:
                stopping.exit_process(list_checkpoints(out))
    maps = {name: value.detach().clone() for name, value in grower.state_dict().items()}
    return replace(learned, maps=maps, cost=made.cost)


def fit_from_options(
    source: Checkpoint,
    growth: Growth,
    data: Text | None,
    options: Mapping[str, Any],
    ticker: Ticker,
    out: Path | None = None,
) -> Learned:
    """`fit` from the command line: `data` is text or names a .npz of images, the objective what the family is made for.

    `options`: Ligo's, and `batch`, `length`, `micro`, `precision`. RegraftError names an unknown one, or asks for data.
    """
    known = {f.name for f in fields(Ligo)} | set(RUN)
    if unknown := sorted(set(options) - known):
        raise RegraftError(f"unknown --fit '{unknown[0]}': use {', '.join(sorted(known))}")
    method = growth.ligo_options(
        **{name: value for name, value in options.items() if name not in RUN}
    )
    run = RUN | {name: value for name, value in options.items() if name in RUN}
    if data is None and method.steps:
        raise RegraftError(
            f"--width-init ligo learns from text or images: give --data PATH, or --fit '{ZERO_STEPS}'"
        )
    if data is None:
        return replace(cast(Learned, growth.steps(source)[-1]), method=method)
    anatomy = source.anatomy
    kind = "image" if anatomy.inputs == "pixels" else "next" if anatomy.causal else "mask"
    room = min(int(run["length"]), source.sizes.get("pos", int(run["length"])))
    stage = Stage(kind, run["batch"] * room, room, run["batch"], precision=run["precision"])  # type: ignore[arg-type]
    whole = replace(stage, tokens=stage.tokens * max(method.steps, 1))
    ticker.start("reading data")
    tokenizer = None if kind == "image" else modeling.load_tokenizer(source.path)
    rows = load_stage_rows(data, whole, tokenizer, ticker=ticker)(stage.length)

    def report_progress(step: int, steps: int, row: Mapping[str, float]) -> None:
        ticker.update(
            step / steps,
            f"loss {row['loss']:.4f}, weights cost {100 * row['overhead']:.2f} % of a step",
        )

    ticker.start("fitting LiGO's maps")
    return fit_maps(
        source, growth, method, stage, rows, growth.seed, run["micro"], report_progress, out
    )


class LigoTrainer:
    """The grown model, whose parameters hold what the maps make of the source's, and the maps' optimiser."""

    def __init__(self, target: Checkpoint, grower: Grower, method: Ligo):
        self.grower, self.method = grower, method
        self.model = fsdp.load_sharded(
            target, fsdp.build_mesh() if distributed.world_size() > 1 else None
        )
        self.holds = match_parameters(self.model, target)
        groups = [
            {"params": list(grower.spaces.parameters()), "peak": method.lr},
            {"params": list(grower.mixing.parameters()), "peak": method.lr_depth},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=method.lr, weight_decay=method.decay)
        self.cost: dict[str, float] = {
            "steps": 0,
            "tokens": 0,
            "flops": 0,
            "seconds": 0.0,
            "overhead": 0.0,
        }
        self.counts: tuple[int, int] | None = None  # FLOPs of making weights, of training on them

    def restore(self, state: RunState) -> RunState:
        """Go on where `state`, whose maps are read already, says; the state."""
        state.restore_optimizer(self.grower, self.optimizer)
        if state.ledger:
            self.cost = state.ledger[0]
            self.counts = (state.costs["weights"], state.costs["training"])
        return state

    def record_state(self, state: RunState) -> RunState:
        """The state with all that a checkpoint needs beside maps and moments."""
        assert self.counts is not None
        state.changed, state.ledger = (
            {name for name, _ in self.grower.named_parameters()},
            [self.cost],
        )
        state.costs = dict(zip(("weights", "training"), self.counts, strict=True))
        return state

    def step(self, stage: Stage, rows: Rows, step: int, seed: int, micro: int) -> dict[str, float]:
        """One step of the maps on `rows`, `micro` of them at a time."""
        begun = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.lr_factor(step)
        if self.counts is None:
            value, self.counts = self.count_step_flops(stage, rows, seed, micro)
        else:
            made = self.grow_weights()
            value = self.backward_loss(stage, rows, seed + step, micro)
            self.backward_maps(made)
        if not math.isfinite(value):
            raise RegraftError(
                f"LiGO's loss is {value} at step {step}: lower its lr ({self.method.lr:g}) and run again"
            )
        torch.nn.utils.clip_grad_norm_(self.grower.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.cost["steps"] += 1
        self.cost["tokens"] += rows.tokens
        self.cost["flops"] += sum(self.counts)
        self.cost["seconds"] += time.monotonic() - begun
        self.cost["overhead"] = self.counts[0] / self.counts[1]
        return {"loss": value, **self.cost}

    def lr_factor(self, step: int) -> float:
        """Learning-rate factor: a short rise, then linearly down."""
        return min((step + 1) / max(1, self.method.warmup), 1 - step / self.method.steps)

    def count_step_flops(
        self, stage: Stage, rows: Rows, seed: int, micro: int
    ) -> tuple[float, tuple[int, int]]:
        """A step under the FLOP counter: its loss, FLOPs of making weights and of training on them."""
        with flops.build_flop_counter() as making:
            made = self.grow_weights()
        with flops.build_flop_counter() as training:
            value = self.backward_loss(stage, rows, seed, micro)
        with flops.build_flop_counter() as back:
            self.backward_maps(made)
        mine = (making.get_total_flops() + back.get_total_flops(), training.get_total_flops())
        made_all, trained_all = (
            sum(counts) for counts in zip(*distributed.all_gather(mine), strict=True)
        )
        return value, (made_all, trained_all)

    def grow_weights(self) -> list[Tensor]:
        """The grown weights, as the parameters hold them, put into the model; with their graph."""
        grown = self.grower()
        made = [
            grown[keys[0]]
            if len(keys) == 1
            else torch.cat([grown[key].flatten() for key in keys]).view(parameter.shape)
            for parameter, keys in self.holds
        ]
        with torch.no_grad():
            for (parameter, _), value in zip(self.holds, made, strict=True):
                fsdp.local_part(parameter).copy_(fsdp.shard_like(value, parameter))
        return made

    def backward_loss(self, stage: Stage, rows: Rows, seed: int, micro: int) -> float:
        """Gradients of the loss in the model's parameters; the mean loss over the rows of all processes."""
        kind, fast, total = cast(Kind, stage.kind), stage.precision == "bfloat16", 0.0
        given, labels = build_targets(
            self.model, kind, rows, torch.Generator().manual_seed(seed), stage.mask_share
        )
        told = int((labels != IGNORED).sum())
        place = fsdp.local_part(next(self.model.parameters())).device
        for piece in micro_batches(len(rows), micro):
            some, wanted = given[piece].to(place), labels[piece].to(place)
            share = distributed.world_size() * int((wanted != IGNORED).sum()) / told
            value = share * run_in_forward(
                self.model, partial(compute_loss_on_targets, self.model, kind, some, wanted, fast)
            )
            value.backward()
            total += float(value.detach())
        return sum(distributed.all_gather(total)) / distributed.world_size()

    def backward_maps(self, made: Sequence[Tensor]) -> None:
        """The parameters' gradients, carried on to the maps: of each process's shards, then added up."""
        mine, grads = [], []
        for (parameter, _), value in zip(self.holds, made, strict=True):
            if parameter.grad is not None and value.requires_grad:
                mine.append(fsdp.shard_like(value, parameter))
                grads.append(fsdp.local_part(parameter.grad).to(mine[-1].device))
        torch.autograd.backward(mine, grads)
        self.model.zero_grad(set_to_none=True)
        distributed.all_reduce([p.grad for p in self.grower.parameters() if p.grad is not None])


def match_parameters(model: nn.Module, target: Checkpoint) -> list[tuple[nn.Parameter, list[Key]]]:
    """Every parameter with the tensors of the checkpoint that it holds one after the other: one, or a block of experts.

    RegraftError when a class keeps a tensor otherwise inside a larger one.
    """
    named = list(model.named_parameters())
    numbers = {
        name: torch.tensor(float(number)).expand(p.shape) for number, (name, p) in enumerate(named)
    }
    filed = modeling.to_checkpoint_names(model, numbers)
    inside: dict[int, list[Key]] = {}
    for key, name in target.names.items():
        number = filed[name].unique().long().tolist() if name in filed else []
        if len(number) != 1:
            raise fused_tensor_error(target, name)
        inside.setdefault(number[0], []).append(key)
    found = []
    for number, keys in inside.items():
        name, parameter = named[number]
        if len(keys) > 1 or parameter.shape != target.tensors[keys[0]].shape:
            entries = torch.arange(parameter.numel()).view(parameter.shape)
            places = modeling.to_checkpoint_names(model, {name: entries})
            spans = {key: places[target.names[key]].flatten() for key in keys}
            keys.sort(key=lambda key: int(spans[key][0]))
            if not torch.equal(torch.cat([spans[key] for key in keys]), entries.flatten()):
                raise fused_tensor_error(target, target.names[keys[0]])
        found.append((parameter, keys))
    return found


def fused_tensor_error(target: Checkpoint, name: str) -> RegraftError:
    """The error for a tensor that cannot be found in the model as a whole."""
    return RegraftError(
        f"{target.anatomy.family}'s class keeps '{name}' in pieces of a larger tensor, which LiGO cannot fit: use "
        "another --width-init"
    )
