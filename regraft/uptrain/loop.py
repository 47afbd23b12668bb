"""The training loop: stages in order, a checkpoint every so often, resume that continues the same losses."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..corpus.rows import Table
from ..errors import RegraftError
from ..flops import counter as counted
from ..hosts.modeling_regraft import RegraftForCausalLM
from ..mixers.gated import Gated
from . import adam, speed
from .data import Packed, shuffled
from .divergence import Jump, guard
from .layers import always, chosen, frozen, running, stack
from .lowrank import attach, detach
from .matching import align_step, matrix_step, taught
from .objectives import Data, Rows, headed, loss_of, measured, suited, targets
from .resume import RunState, checkpoints, load_state, save_state
from .stages import LAYERWISE, Stage, distil_step, kl, parameter_groups, projections, thaw
from .teaching import Lessons, Teacher

MEASURED_STEPS = 3  # a stage with a time limit fixes its length after these
Progress = Callable[[Stage, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """Everything a training run needs. `rows` gives the packed text for a row length, or images; `limit` seconds for a
    stage, or None.

    `teacher_slots` are the attention modules of the teacher, for alignment. `heldout` is measured before the first step
    of a stage, at its end and, unless `every` is 0, after every so many steps, with the layers that the stage runs;
    neither its time nor its FLOPs count. `moments`: Adam's state to begin with, a file as `regraft grow
    --optimizer-state` writes it; `keep_moments` leaves the last stage's as `out/optimizer.safetensors`. Order of rows,
    masks and drops follow from seed, stage and step. `jump`: when a loss is astray; `track` gets all rows of metrics.
    """

    model: PreTrainedModel
    stages: Sequence[Stage]
    rows: Callable[[int], Data]
    out: Path
    teacher: Teacher | None = None
    teacher_slots: Sequence[nn.Module] = ()
    seed: int = 0
    limit: Callable[[int], float | None] = lambda stage: None
    progress: Progress = lambda stage, step, steps, row: None
    save_seconds: float = 60.0
    heldout: Rows | None = None
    every: int = 0
    moments: Path | None = None
    keep_moments: bool = False
    jump: Jump = Jump()
    track: Callable[[dict[str, Any]], None] = lambda row: None


@cache
def bfloat16_is_faster(device: str) -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32; measured in some milliseconds."""
    if device != "cpu":
        return True
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        best = []
        for _ in range(8):
            begin = time.perf_counter()
            a @ a
            best.append(time.perf_counter() - begin)
        times[dtype] = min(best)
    return times[torch.bfloat16] < 0.75 * times[torch.float32]


def train(run: Run) -> dict[str, Any]:
    """Train through every stage; returns the ledger: per stage tokens, FLOPs (the teacher's forward included), seconds.

    Progress is kept in `out/run`: called again with the same arguments it goes on where the last checkpoint was, with
    the losses the uninterrupted run would have had. Rows go to `out/metrics.jsonl`. Raises RegraftError when `out/run`
    belongs to other settings, when a stage lacks its teacher, or when a loss is not finite.
    """
    for stage in run.stages:
        possible(run, stage)
    state = load_state(run.out, run.model, settings(run))
    state.trim_metrics(run.out / "metrics.jsonl")
    for index in range(state.stage, len(run.stages)):
        train_stage(run, state, index)
    return {"stages": state.ledger, **totals(state.ledger)}


def possible(run: Run, stage: Stage) -> None:
    """RegraftError when the model has no head for a stage, no mixers to align, or no fitting teacher."""
    headed(run.model, stage.objective)
    if stage.kind in LAYERWISE and not isinstance(run.model, RegraftForCausalLM):
        kind = type(run.model).__name__
        raise RegraftError(f"stage '{stage.kind}' fits mixers, which a {kind} has not: linearize it first")
    if stage.learn != "all" and not isinstance(run.model, RegraftForCausalLM):
        kind = type(run.model).__name__
        raise RegraftError(f"learn '{stage.learn}' is for models with mixers: train all of a {kind}")
    if stage.rank and not (isinstance(run.model, RegraftForCausalLM) and projections(run.model)):
        raise RegraftError(f"rank {stage.rank} adds to projections inside mixers, and there are none: give 0")
    if stage.window_drop and not any(isinstance(module, Gated) for module in run.model.modules()):
        raise RegraftError(
            f"window_drop {stage.window_drop} leaves windows out, and no layer has one: linearize with one"
        )
    if (stage.layers, stage.layer_drop, stage.token_drop) != ("all", 0, 0):
        if isinstance(run.model, RegraftForCausalLM):
            raise RegraftError(f"layers '{stage.layers}' and drops are for models without mixers: train all layers")
        chosen(stage.layers, len(stack(run.model)))
    if run.teacher is None and stage.kind in (*LAYERWISE, "distil"):
        raise RegraftError(f"stage '{stage.kind}' needs a teacher: give the source model")
    if run.teacher is not None and stage.objective == "next":
        if not isinstance(run.teacher, Lessons):
            headed(run.teacher, "next")
        if run.teacher.config.vocab_size != run.model.config.vocab_size:
            raise RegraftError(
                f"the teacher has {run.teacher.config.vocab_size} tokens, the model {run.model.config.vocab_size}: "
                "give a teacher with the same tokenizer"
            )


def settings(run: Run) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    begun = {"moments": str(run.moments)} if run.moments else {}
    begun |= {"teacher outputs": run.teacher.keeping.kind} if isinstance(run.teacher, Lessons) else {}
    return {"seed": run.seed, "stages": [dataclasses.asdict(stage) for stage in run.stages], **begun}


def learning(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def totals(ledger: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over stages."""
    return {key: sum(entry[key] for entry in ledger) for key in ("tokens", "flops", "seconds")}


def train_stage(run: Run, state: RunState, index: int) -> None:
    """One stage from where `state` says; ends with a checkpoint that starts the next."""
    stage, rows = run.stages[index], run.rows(run.stages[index].length)
    for data in (rows, run.heldout or rows):
        suited(run.model, stage.objective, data)
    if state.tokens:
        stage = dataclasses.replace(stage, tokens=state.tokens)
    if stage.precision == "auto":
        fast = state.fast if state.fast is not None else bfloat16_is_faster(rows.device.type)
    else:
        fast = stage.precision == "bfloat16"
    state.fast = fast
    names = projections(run.model) if stage.rank else []
    low = attach(run.model, names, stage.rank, run.seed + index, state.moments) if names else None
    groups = parameter_groups(run.model, stage, frozen(run.model, stage.layers))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if state.watch.unfrozen is not None:
        thaw(run.model, stage, optimizer, state.watch.unfrozen)
    state.restore_optimizer(run.model, optimizer)
    if run.moments is not None and index == state.step == 0:
        adam.begin(run.model, optimizer, run.moments)
    state.changed |= learning(run.model)
    if low is not None:
        state.changed |= low.begin(names)
    order = shuffled(len(rows), stage.steps * stage.batch, run.seed + index)
    best = speed.peak(rows.device, fast)
    entry = state.entry(index, stage.kind, fast)
    if state.step == 0:
        measure(run, stage, index, 0, entry)
    saved, begun, first = time.monotonic(), time.monotonic(), state.step
    while state.step < stage.steps:
        tick = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * stage.rate(state.step, group.get("since"))
        picked = rows[order[state.step * stage.batch : (state.step + 1) * stage.batch]]
        value, flops = one_step(run, stage, index, state.step, picked, fast, state.costs)
        if low is not None:
            low.pull()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if low is not None:
            low.push()
        state.step += 1
        entry["tokens"] += picked.tokens
        entry["flops"] += flops
        entry["flops_per_step"] = entry["flops"] // state.step
        spent = time.monotonic() - tick
        entry["seconds"] += spent
        where = (index, state.step)
        guard(state.trend, run.jump, stage, where, value, float(norm), lambda: checkpoints(run.out))
        row = {
            "stage": index, "kind": stage.kind, "step": state.step, "tokens": entry["tokens"],
            "loss": value, "grad_norm": float(norm),
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "seconds": round(entry["seconds"], 3), "flops": entry["flops"],
            **speed.rates(picked.tokens, flops, spent, best),
        }  # fmt: skip
        if stage.learn == "lit" and state.watch.observe(value, stage.lit):
            row["unfrozen"] = entry["unfrozen"] = state.step
            thaw(run.model, stage, optimizer, state.step)
            state.changed, state.costs = state.changed | learning(run.model), {}
        write(run, row)
        if state.step == first + 1:
            begun = time.monotonic()  # the first step is slower: it is counted, and memory is new
        run.progress(stage, state.step, stage.steps, row)
        limit = run.limit(index)
        if limit is not None and not state.tokens and state.step == max(MEASURED_STEPS, first + MEASURED_STEPS):
            stage = fit_to_time(stage, state, limit, (time.monotonic() - begun) / (state.step - first - 1))
            order = shuffled(len(rows), stage.steps * stage.batch, run.seed + index)
        if state.step == stage.steps or (run.every and state.step % run.every == 0):
            measure(run, stage, index, state.step, entry)
        due = time.monotonic() - saved > run.save_seconds and not state.trend.suspected
        if due and state.step < stage.steps:
            save_state(run.out, run.model, optimizer, state, settings(run))
            saved = time.monotonic()
    if run.keep_moments and index == len(run.stages) - 1:
        adam.keep(run.model, optimizer, run.out)
    if low is not None:
        state.changed -= detach(run.model)
    state.next_stage()
    save_state(run.out, run.model, None, state, settings(run))


def measure(run: Run, stage: Stage, index: int, step: int, entry: dict[str, Any]) -> None:
    """A row of metrics.jsonl on held-out rows, when there are any: loss, accuracy, and the KL to a teacher."""
    if run.heldout is not None:
        whole = dataclasses.replace(stage, layer_drop=0.0, token_drop=0.0, window_drop=0.0)
        with running(run.model, whole, step, generator(run.seed, index, step)):
            found: dict[str, float] = measured(run.model, stage.objective, run.heldout)
            if run.teacher is not None and isinstance(run.heldout, Packed) and stage.objective == "next":
                found["kl"] = kl(run.model, run.teacher, run.heldout)
        spent = {"tokens": entry["tokens"], "flops": entry["flops"], "seconds": round(entry["seconds"], 3)}
        write(run, {"stage": index, "step": step, **spent, **{f"eval_{key}": value for key, value in found.items()}})


def write(run: Run, row: dict[str, Any]) -> None:
    """One more row of metrics.jsonl."""
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run.track(row)


def generator(seed: int, stage: int, step: int, use: int = 0) -> torch.Generator:
    """Random numbers of one step, the same whenever it is run; `use`: 0 for masks, 1 for drops."""
    return torch.Generator().manual_seed((((seed * 1_000_003 + stage) * 1_000_003 + step) * 2 + use) % 2**63)


def fit_to_time(stage: Stage, state: RunState, left: float, per_step: float) -> Stage:
    """The stage with as many steps as fit into `left` seconds, at least those done, at most those asked for."""
    steps = min(stage.steps, max(state.step, state.step + int(left / per_step)))
    state.tokens = steps * stage.length * stage.batch
    return dataclasses.replace(stage, tokens=state.tokens)


def one_step(
    run: Run, stage: Stage, index: int, step: int, rows: Rows, fast: bool, costs: dict[str, int]
) -> tuple[float, int]:
    """(the stage's loss on these rows, backpropagated; FLOPs). The first step of each cost is run under the counter."""
    labels: Tensor | None = None
    if stage.kind in ("next", "mask", "image"):
        masks = generator(run.seed, index, step)
        rows, labels = targets(run.model, stage.objective, rows, masks, stage.mask_share)
    held = always(rows, labels) if stage.token_drop else None
    with running(run.model, stage, step, generator(run.seed, index, step, 1), held) as cost:
        cost += taught(run.model, run.teacher, stage.kind, rows, fast)
        if cost in costs:
            return backpropagated(run, stage, rows, labels, fast), costs[cost]
        with counted() as counter:
            value = backpropagated(run, stage, rows, labels, fast)
        costs[cost] = counter.get_total_flops()
    return value, costs[cost]


def backpropagated(run: Run, stage: Stage, rows: Rows, labels: Tensor | None, fast: bool) -> float:
    """The stage's loss; gradients are left in the model."""
    if labels is not None:
        value = loss_of(run.model, stage.objective, rows, labels, fast)
        value.backward()
        return float(value.detach())
    assert run.teacher is not None and isinstance(rows, Packed)
    if stage.kind in LAYERWISE:
        match = align_step if stage.kind == "align" else matrix_step
        return match(run.model, run.teacher, list(run.teacher_slots), rows, fast)
    return distil_step(run.model, run.teacher, rows, fast, stage.ce)


def batches(rows: Table, count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """`count` rows as calibration batches of one: (input_ids, position_ids, segments)."""
    picked = [rows[i : i + 1] for i in shuffled(len(rows), min(count, len(rows)), seed)]
    return [(row.input_ids, row.position_ids, row.segments()) for row in picked]
