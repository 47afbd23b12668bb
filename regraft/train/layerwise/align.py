"""Alignment layer by layer: one layer of the teacher and one mixer in memory, whatever the depth of the model."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import distributed
from ...core.checkpoint import Checkpoint
from ...data.packing import Packed, shuffled_indices
from ...errors import RegraftError
from ...io.linux import return_freed_memory
from ...mixers.base import Attention, Mixer
from ...mixers.registry import build
from ...modeling.flops import build_flop_counter as counted
from .. import throughput
from ..align import as_single_documents, matrix_loss, output_attention_weights, output_loss
from ..calibrate import calibrate_layer
from ..divergence import LossTrend, check_divergence
from ..hooks import LayerRecord
from ..ledger import sum_costs
from ..optimizer import build_groups, mixer_parameter_origins
from .activations import ActivationStore
from .one_layer_model import OneLayerModel
from .state import (
    LayerwiseRun,
    LayerwiseState,
    build_trained_checkpoint,
    check_layerwise_run,
    layer_path,
    write_layer,
    write_metrics_row,
)


def align(run: LayerwiseRun) -> tuple[Checkpoint, dict[str, Any]]:
    """(the target with trained mixers, to be saved; the ledger, as `loop.train` gives it). Rows of metrics.jsonl go to
    `out`.

    Called again after a kill, it goes on with the layer that was not finished and ends with the same weights. Errors:
    RegraftError for a stage that does not train mixers one by one, other settings than the run in `out` had, a model
    that does not fit, a full disk, or a loss that is not finite.
    """
    check_layerwise_run(run)
    state = LayerwiseState.load(run)
    LayerwiseAligner(run, state).align_layers()
    ledger = {
        "stages": [state.entry],
        "start": [state.start] * bool(state.start),
        **sum_costs([state.entry]),
    }
    return build_trained_checkpoint(run, ledger), ledger


class LayerwiseAligner:
    """A run on its way through the layers."""

    def __init__(self, run: LayerwiseRun, state: LayerwiseState):
        self.run, self.state, stage = run, state, run.stage
        self.fast = state.entry["precision"] == "bfloat16"
        self.order = shuffled_indices(len(run.rows), stage.steps * stage.batch, run.seed).view(
            stage.steps, stage.batch
        )
        self.share = stage.batch // distributed.world_size()
        self.mine = self.order[:, distributed.rank() * self.share :][:, : self.share]
        self.calibrating = shuffled_indices(len(run.rows), len(run.rows), run.seed)[
            : run.calibration
        ]
        used = torch.cat((self.mine.flatten(), self.calibrating)).unique()
        folder, width = run.scratch or run.folder, run.source.sizes["hidden"]
        self.hidden = ActivationStore(
            folder, distributed.rank(), used, run.rows.length, width, run.keep
        )
        self.converted = [layer for layer, spec in enumerate(run.target.config["mixers"]) if spec]

    def read_rows(self, numbers: Tensor) -> Packed:
        """Rows of the text, as the stage reads them."""
        found = self.run.rows[numbers]
        return as_single_documents(found) if self.run.stage.kind == "matrix" else found

    def align_layers(self) -> None:
        """Through all layers up to the last that is converted."""
        run, state = self.run, self.state
        run.folder.mkdir(parents=True, exist_ok=True)
        self.hidden.check_disk_space()
        state.trim_metrics(run.out / "metrics.jsonl")
        return_freed_memory()
        teacher = OneLayerModel(run.source, run.device)
        whole = all(distributed.all_gather(self.hidden.has_layer(state.passed)))
        layer = state.passed if whole else 0
        if not whole:
            self.write_first_inputs(teacher)
        while True:
            self.hidden.delete_before(before=layer)
            if layer in self.converted and layer not in state.trained:
                self.train_layer(teacher, layer)
                return_freed_memory()
            if layer >= self.converted[-1]:
                break
            self.write_next_inputs(teacher, layer)
            return_freed_memory()
            layer += 1
        self.hidden.delete_before(before=layer + 1)
        state.entry["tokens"] = run.stage.steps * run.stage.batch * run.stage.length
        state.entry["flops_per_step"] = state.entry["flops"] // run.stage.steps

    def write_first_inputs(self, teacher: OneLayerModel) -> None:
        """Write what the first layer gets."""
        rows = self.read_rows(self.hidden.rows)
        with self.hidden.open_writer(0) as out, self.autocast():
            for _, values in teacher.embed_batches(rows.input_ids, rows.position_ids, self.share):
                out.append(values)

    def write_next_inputs(self, teacher: OneLayerModel, layer: int) -> None:
        """Write what the next layer gets."""
        begin, flops = time.monotonic(), 0
        costs: dict[int, int] = {}
        with (
            self.hidden.open_writer(layer + 1) as out,
            self.output_attention_weights(teacher),
            teacher.load_layer(layer),
        ):
            for numbers in self.hidden.rows.split(self.share):
                given, positions = self.read_inputs(layer, numbers)
                with CachedFlopCounter(costs, len(numbers)) as count, self.autocast():
                    out.append(teacher.run_layer(given, positions))
                flops += count.flops
        distributed.barrier()
        if layer + 1 > self.state.passed:
            self.state.add_cost(self.state.entry, flops, time.monotonic() - begin)
            self.state.passed = layer + 1
            self.state.save(self.run)

    def train_layer(self, teacher: OneLayerModel, layer: int) -> None:
        """Fit one mixer and write it to disk."""
        run, stage, begin, flops = self.run, self.run.stage, time.monotonic(), 0
        spec, attention = (
            run.target.config["mixers"][layer],
            Attention(**run.target.config["attention"][layer]),
        )
        mixer = load_target_mixer(run, layer).to(run.device)
        with self.output_attention_weights(teacher), teacher.load_layer(layer, mlp=False):
            with counted() as closed:
                if run.calibration:
                    calibrate_layer(mixer, *self.calibration_records(teacher, layer))
            closing, begin = time.monotonic() - begin, time.monotonic()
            groups = build_groups(
                mixer.parameters(), mixer_parameter_origins(mixer, spec, attention), stage, True
            )
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
            learning = [p for group in optimizer.param_groups for p in group["params"]]
            costs: dict[int, int] = {}
            trend, best, tick = (
                LossTrend(),
                throughput.measure_peak_flops(run.device, self.fast),
                time.monotonic(),
            )
            for step, numbers in enumerate(self.mine):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * stage.lr_factor(step)
                with CachedFlopCounter(costs, len(numbers)) as count:
                    value = self.backward_loss(teacher, mixer, layer, numbers)
                flops += count.flops
                value = all_reduce_step(
                    value * self.share / stage.batch, learning, self.share / stage.batch
                )
                norm = float(nn.utils.clip_grad_norm_(learning, stage.clip))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.check_loss(trend, layer, step + 1, value, norm)
                tick, spent = time.monotonic(), time.monotonic() - tick
                size, done = (
                    stage.batch * stage.length,
                    self.converted.index(layer) * stage.steps + step + 1,
                )
                row: dict[str, Any] = {
                    "stage": 0, "kind": stage.kind, "layer": layer, "step": done, "tokens": done * size,
                    "loss": value, "grad_norm": norm, "lr": max(group["lr"] for group in optimizer.param_groups),
                    "seconds": round(self.state.entry["seconds"] + time.monotonic() - begin, 3),
                    "flops": self.state.entry["flops"] + flops * distributed.world_size(),
                    **throughput.compute_throughput(size, count.flops * distributed.world_size(), spent, best),
                }  # fmt: skip
                write_metrics_row(run, row)
                run.progress(stage, done, stage.steps * len(self.converted), row)
        if distributed.is_rank0():
            place = f"host.{run.target.config['slot'].format(layer)}.mixer"
            values = {
                f"{place}.{name}": parameter.detach().cpu().contiguous()
                for name, parameter in mixer.named_parameters()
            }
            write_layer(layer_path(run, layer), values)
        distributed.barrier()
        self.state.add_cost(self.state.entry, flops, time.monotonic() - begin)
        if run.calibration:
            self.state.add_cost(self.state.start, closed.get_total_flops(), closing)
        self.state.trained.append(layer)
        self.state.save(run)

    def check_loss(
        self, trend: LossTrend, layer: int, step: int, value: float, norm: float
    ) -> None:
        """RegraftError when a layer's loss is no number or has jumped; layers before it are on disk."""
        try:
            check_divergence(trend, self.run.jump, self.run.stage, (0, step), value, norm, list)
        except RegraftError as error:
            done = f"finished layers {self.state.trained} are in '{self.run.folder}'"
            raise RegraftError(f"layer {layer}: {error} ({done})") from None

    def backward_loss(
        self, teacher: OneLayerModel, mixer: Mixer, layer: int, numbers: Tensor
    ) -> float:
        """The mean loss of these rows, backpropagated."""
        rows = self.read_rows(numbers)
        measure = output_loss if self.run.stage.kind == "align" else matrix_loss
        with self.autocast():
            record, segments = (
                teacher.record_attention(*self.read_inputs(layer, numbers)),
                rows.segments(),
            )
            segments = None if segments is None else segments.to(self.run.device)
            value = measure(mixer, record, segments)
        value.backward()
        return float(value.detach())

    def calibration_records(
        self, teacher: OneLayerModel, layer: int
    ) -> tuple[list[LayerRecord], list[Tensor | None]]:
        """What the layer sees and gives on the rows for calibration, one row at a time, and their documents."""
        found: list[LayerRecord] = []
        documents: list[Tensor | None] = []
        for numbers in self.calibrating.split(1):
            with self.autocast():
                found.append(teacher.record_attention(*self.read_inputs(layer, numbers)))
            segments = self.read_rows(numbers).segments()
            documents.append(None if segments is None else segments.to(self.run.device))
        return found, documents

    def read_inputs(self, layer: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states, positions) of some rows, on the device."""
        given, positions = (
            self.hidden.read_rows(layer, numbers),
            self.read_rows(numbers).position_ids,
        )
        return given.to(self.run.device), positions.to(self.run.device)

    def autocast(self) -> torch.autocast:
        """The stage's precision."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.fast)

    def output_attention_weights(self, teacher: OneLayerModel) -> AbstractContextManager[None]:
        """For matrices: attention layers that give theirs."""
        return (
            output_attention_weights(teacher.model)
            if self.run.stage.kind == "matrix"
            else nullcontext()
        )


class CachedFlopCounter:
    """Inside, work runs; afterwards `flops` is what it took: counted once for each number of rows, then looked up."""

    def __init__(self, costs: dict[int, int], rows: int):
        self.costs, self.rows, self.flops = costs, rows, costs.get(rows, 0)
        self.counter = None if rows in costs else counted()

    def __enter__(self) -> CachedFlopCounter:
        if self.counter is not None:
            self.counter.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.counter is not None:
            self.counter.__exit__(*reason)
            self.flops = self.costs[self.rows] = self.counter.get_total_flops()


def load_target_mixer(run: LayerwiseRun, layer: int) -> Mixer:
    """A converted layer's mixer with the target's weights, float32."""
    target = run.target
    with torch.device("meta"):
        mixer = build(
            target.config["mixers"][layer], Attention(**target.config["attention"][layer])
        )
    values = {
        role.removeprefix("mixer."): lazy.read().to(run.device, torch.float32, copy=True)
        for (role, at), lazy in target.tensors.items()
        if at == layer and role.startswith("mixer.")
    }
    mixer.load_state_dict(values, assign=True)
    for tensor in mixer.parameters() if distributed.world_size() > 1 else ():
        dist.broadcast(tensor.data, 0)
    return mixer


def all_reduce_step(value: float, parameters: list[nn.Parameter], share: float) -> float:
    """The loss over all processes; gradients become those of the whole batch, of which each has had its share."""
    if distributed.world_size() == 1:
        return value
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad.mul_(share))
    return sum(distributed.all_gather(value))
