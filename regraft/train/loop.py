"""The training loop: stages in order, a checkpoint every so often, resume that continues the same losses."""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..data.packing import Packed, shuffled_indices
from ..data.rows import Table
from ..io.files import append_json_line
from . import optimizer_state, throughput
from .divergence import check_divergence
from .fsdp import gather_tensor
from .fsdp_forward import reshard_model, run_in_forward
from .gradient_checkpointing import set_gradient_checkpointing
from .layer_subset import apply_stage_layers, frozen_parameter_ids
from .lora import attach_lora, detach_lora
from .objectives import check_rows, evaluate_objective
from .resume import RunState, list_checkpoints, load_state, lock_run, save_state
from .run import Progress, Run, check_run, resume_settings
from .signals import SigtermHandler
from .stage import Stage, evaluate_kl, parameter_groups, projection_names, unfreeze
from .step import step_generator, train_step

__all__ = ["Progress", "Run", "calibration_batches", "shuffled_indices", "train"]

MEASURED_STEPS = 3  # a stage with a time limit fixes its length after these


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
    the losses the uninterrupted run would have had, bit for bit in as many processes and within round-off in another
    number. Rows go to `out/metrics.jsonl`. SIGTERM ends it with a checkpoint after the step. Raises RegraftError when
    `out/run` belongs to other settings, when a stage lacks its teacher, or when a loss is not finite.
    """
    for stage in run.stages:
        check_run(run, stage)
    set_gradient_checkpointing(run.model, run.checkpointing)
    with SigtermHandler() as stopping, lock_run(run.out):
        state = load_state(run.out, run.model, resume_settings(run))
        if distributed.is_rank0():
            state.trim_metrics(run.out / "metrics.jsonl")
        for index in range(state.stage, len(run.stages)):
            train_stage(run, state, index, stopping)
    return {"stages": state.ledger, **totals(state.ledger)}


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def totals(ledger: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over stages."""
    return {key: sum(entry[key] for entry in ledger) for key in ("tokens", "flops", "seconds")}


def train_stage(run: Run, state: RunState, index: int, stopping: SigtermHandler) -> None:
    """One stage from where `state` says; ends with a checkpoint that starts the next."""
    stage, rows = run.stages[index], run.rows(run.stages[index].length)
    for data in (rows, run.heldout or rows):
        check_rows(run.model, stage.objective, data)
    if state.tokens:
        stage = dataclasses.replace(stage, tokens=state.tokens)
    if stage.precision == "auto":
        fast = (
            state.fast
            if state.fast is not None
            else distributed.broadcast(bfloat16_is_faster(run.device.type))
        )
    else:
        fast = stage.precision == "bfloat16"
    state.fast = fast
    names = projection_names(run.model) if stage.rank else []
    low = (
        attach_lora(run.model, names, stage.rank, run.seed + index, state.moments)
        if names
        else None
    )
    groups = parameter_groups(run.model, stage, frozen_parameter_ids(run.model, stage.layers))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if state.watch.unfrozen is not None:
        unfreeze(run.model, stage, optimizer, state.watch.unfrozen)
    state.restore_optimizer(run.model, optimizer)
    if run.moments is not None and index == state.step == 0:
        optimizer_state.load_optimizer_state(run.model, optimizer, run.moments)
    state.changed |= trainable_names(run.model)
    if low is not None:
        state.changed |= low.enable_gradients(names)
    order = shuffled_indices(len(rows), stage.steps * stage.batch, run.seed + index)
    best = throughput.measure_peak_flops(run.device, fast)
    entry = state.ledger_entry(index, stage.kind, fast)
    if state.step == 0:
        evaluate_heldout(run, stage, index, 0, entry)
    saved, begun, first = time.monotonic(), time.monotonic(), state.step
    while state.step < stage.steps:
        tick = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * stage.lr_factor(state.step, group.get("since"))
        picked = rows[order[state.step * stage.batch : (state.step + 1) * stage.batch]]
        part, flops = train_step(run, stage, index, state.step, picked, fast, state.costs)
        if low is not None:
            low.pull_gradients()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = gather_tensor(torch.nn.utils.clip_grad_norm_(trained, stage.clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if low is not None:
            low.write_weights()
        state.step += 1
        value, stop, due = reduce_step_status(
            part, stopping.asked, time.monotonic() - saved > run.save_seconds
        )
        entry["tokens"] += picked.tokens
        entry["flops"] += flops
        entry["flops_per_step"] = entry["flops"] // state.step
        spent = time.monotonic() - tick
        entry["seconds"] += spent
        where = (index, state.step)
        check_divergence(
            state.trend,
            run.jump,
            stage,
            where,
            value,
            float(norm),
            lambda: list_checkpoints(run.out),
        )
        row = {
            "stage": index, "kind": stage.kind, "step": state.step, "tokens": entry["tokens"],
            "loss": value, "grad_norm": float(norm),
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "seconds": round(entry["seconds"], 3), "flops": entry["flops"],
            **throughput.compute_throughput(picked.tokens, flops, spent, best),
        }  # fmt: skip
        if stage.learn == "lit" and state.watch.observe(value, stage.lit):
            row["unfrozen"] = entry["unfrozen"] = state.step
            unfreeze(run.model, stage, optimizer, state.step)
            state.changed, state.costs = state.changed | trainable_names(run.model), {}
        write_metrics_row(run, row)
        if state.step == first + 1:
            begun = time.monotonic()  # the first step is slower: it is counted, and memory is new
        run.progress(stage, state.step, stage.steps, row)
        limit = run.limit(index)
        if (
            limit is not None
            and not state.tokens
            and state.step == max(MEASURED_STEPS, first + MEASURED_STEPS)
        ):
            left, per_step = distributed.broadcast(
                (limit, (time.monotonic() - begun) / (state.step - first - 1))
            )
            stage = fit_to_time(stage, state, left, per_step)
            order = shuffled_indices(len(rows), stage.steps * stage.batch, run.seed + index)
        if state.step == stage.steps or (run.every and state.step % run.every == 0):
            evaluate_heldout(run, stage, index, state.step, entry)
        if (due or stop) and state.step < stage.steps:
            if not state.trend.is_suspect:
                save_state(run.out, run.model, optimizer, state, resume_settings(run))
            if stop:
                stopping.exit_process(list_checkpoints(run.out))
            saved = time.monotonic()
    if run.keep_moments and index == len(run.stages) - 1:
        optimizer_state.save_optimizer_state(run.model, optimizer, run.out)
    if low is not None:
        state.changed -= detach_lora(run.model)
    state.advance_stage()
    save_state(run.out, run.model, None, state, resume_settings(run))


def reduce_step_status(part: float, asked: bool, due: bool) -> tuple[float, bool, bool]:
    """(the loss: the sum of all parts, whether any process was asked to stop, whether the first one's save is due)."""
    if distributed.world_size() == 1:
        return part, asked, due
    box = torch.tensor([part, asked, due and distributed.is_rank0()], dtype=torch.float64)
    torch.distributed.all_reduce(box)
    return float(box[0]), bool(box[1]), bool(box[2])


def evaluate_heldout(run: Run, stage: Stage, index: int, step: int, entry: dict[str, Any]) -> None:
    """A row of metrics.jsonl on held-out rows, when there are any: loss, accuracy, and the KL to a teacher."""
    if run.heldout is not None:
        whole = dataclasses.replace(stage, layer_drop=0.0, token_drop=0.0, window_drop=0.0)
        model, held = run.model, run.heldout.to(run.device)
        with apply_stage_layers(model, whole, step, step_generator(run.seed, index, step)):
            found: dict[str, float] = run_in_forward(
                model, lambda: evaluate_objective(model, stage.objective, held)
            )
            if (
                (teacher := run.teacher) is not None
                and isinstance(held, Packed)
                and stage.objective == "next"
            ):
                found["kl"] = run_in_forward(model, lambda: evaluate_kl(model, teacher, held))
        reshard_model(model)
        spent = {
            "tokens": entry["tokens"],
            "flops": entry["flops"],
            "seconds": round(entry["seconds"], 3),
        }
        write_metrics_row(
            run,
            {
                "stage": index,
                "step": step,
                **spent,
                **{f"eval_{key}": value for key, value in found.items()},
            },
        )


def write_metrics_row(run: Run, row: dict[str, Any]) -> None:
    """One more row of metrics.jsonl."""
    if not distributed.is_rank0():
        return
    append_json_line(run.out / "metrics.jsonl", row)
    run.track(row)


def fit_to_time(stage: Stage, state: RunState, left: float, per_step: float) -> Stage:
    """The stage with as many steps as fit into `left` seconds, at least those done, at most those asked for."""
    steps = min(stage.steps, max(state.step, state.step + int(left / per_step)))
    state.tokens = steps * stage.length * stage.batch
    return dataclasses.replace(stage, tokens=state.tokens)


def calibration_batches(
    rows: Table, count: int, seed: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """`count` rows as calibration batches of one: (input_ids, position_ids, segments)."""
    picked = [rows[i : i + 1] for i in shuffled_indices(len(rows), min(count, len(rows)), seed)]
    return [(row.input_ids, row.position_ids, row.segments()) for row in picked]
