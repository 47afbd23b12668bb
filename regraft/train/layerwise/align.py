"""Alignment layer by layer: one teacher layer and one mixer in memory, however deep the model."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import distributed
from ...core.checkpoint import Checkpoint
from ...data.packing import shuffled_indices
from ...data.rows import Packed
from ...errors import RegraftError
from ...io.linux import return_freed_memory
from ...io.safetensors import save_tensors
from ...mixers.attention import Attention
from ...mixers.base import Mixer
from ...mixers.registry import build
from ...modeling.flops import build_flop_counter
from .. import throughput
from ..align import as_single_documents, matrix_loss, output_attention_weights, output_loss
from ..calibrate import calibrate_layer, rows_calibrated_together
from ..divergence import LossTrend, check_divergence
from ..hooks import LayerRecord
from ..ledger import sum_costs
from ..metrics import StepResult, build_step_row, write_metrics_row
from ..optimizer import (
    apply_gradients,
    build_groups,
    build_optimizer,
    mixer_parameter_origins,
    set_learning_rates,
)
from ..records import Cost
from ..signals import StopSignals
from .activations import ActivationStore
from .one_layer_model import OneLayerModel
from .state import (
    LayerwiseRun,
    LayerwiseState,
    build_trained_checkpoint,
    check_layerwise_run,
    layer_path,
)


def align(run: LayerwiseRun) -> tuple[Checkpoint, dict[str, Any]]:
    """Train the mixers of a model layer by layer. Rows of metrics.jsonl go to `run.out`.

    Called again after a kill, it resumes at the layer that was not finished and ends with the
    same weights.

    RegraftError for a stage that does not train mixers one by one, settings other than those of
    the run in `run.out`, models that do not fit, a full disk, and a loss that is not finite.

    Returns:
        (the target with trained mixers, which are read when it is saved; the ledger as
        `loop.train` gives it, with `start` for the closed form).
    """
    check_layerwise_run(run)
    state = LayerwiseState.load(run)
    with StopSignals() as stopping:
        LayerwiseAligner(run, state, stopping).align_layers()

    ledger = {
        "stages": [state.entry],
        "start": [state.start] if state.start else [],
        **sum_costs([state.entry]),
    }
    return build_trained_checkpoint(run, ledger), ledger


class LayerwiseAligner:
    """A run on its way through the layers.

    Attributes:
        run: what the run needs.
        state: how far it has come.
        stopping: tells whether the process was asked to stop.
        fast: whether it computes in bfloat16.
        share: rows of a batch that this process takes.
        mine: numbers of its rows, (steps, share).
        calibrating: numbers of the rows for the closed-form start, the same in every process.
        hidden: the input of the current layer, for all these rows.
        converted: numbers of the layers that have a mixer.
    """

    def __init__(self, run: LayerwiseRun, state: LayerwiseState, stopping: StopSignals):
        self.run, self.state, self.stopping, stage = run, state, stopping, run.stage
        self.fast = state.entry["precision"] == "bfloat16"

        # The same order as in the training loop, of which each process takes its columns.
        order = shuffled_indices(len(run.rows), stage.steps * stage.batch, run.seed)
        self.share = stage.batch // distributed.world_size()
        begin = distributed.rank() * self.share
        self.mine = order.view(stage.steps, stage.batch)[:, begin : begin + self.share]
        everything = shuffled_indices(len(run.rows), len(run.rows), run.seed)
        self.calibrating = everything[: run.calibration]

        used = torch.cat((self.mine.flatten(), self.calibrating)).unique()
        folder, width = run.scratch or run.folder, run.source.sizes["hidden"]
        self.hidden = ActivationStore(
            folder, distributed.rank(), used, run.rows.length, width, run.keep
        )
        self.converted = [layer for layer, spec in enumerate(run.target.config["mixers"]) if spec]

    def read_rows(self, numbers: Tensor) -> Packed:
        """Rows of the text by number, as the stage reads them."""
        rows = self.run.rows[numbers]
        return as_single_documents(rows) if self.run.stage.kind == "matrix" else rows

    def align_layers(self) -> None:
        """Go through all layers up to the last one that has a mixer."""
        run, state = self.run, self.state
        run.folder.mkdir(parents=True, exist_ok=True)
        self.hidden.check_disk_space()
        state.trim_metrics(run.out / "metrics.jsonl")
        return_freed_memory()

        # Resume where the inputs of a layer are complete in every process. Inputs in memory
        # (/dev/shm) may be lost: then the pass starts again, but trained mixers stay.
        teacher = OneLayerModel(run.source, run.device)
        if all(distributed.all_gather(self.hidden.has_layer(state.passed))):
            layer = state.passed
        else:
            layer = 0
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
            if any(distributed.all_gather(self.stopping.is_requested)):
                self.exit_process()

        self.hidden.delete_before(before=layer + 1)
        state.entry["tokens"] = run.stage.steps * run.stage.batch * run.stage.length
        state.entry["flops_per_step"] = state.entry["flops"] // run.stage.steps

    def write_first_inputs(self, teacher: OneLayerModel) -> None:
        """Write the input of the first layer."""
        rows = self.read_rows(self.hidden.rows)
        with self.hidden.open_writer(0) as out, self.autocast():
            for _, values in teacher.embed_batches(rows.input_ids, rows.position_ids, self.share):
                out.append(values)

    def write_next_inputs(self, teacher: OneLayerModel, layer: int) -> None:
        """Run the teacher's layer on its inputs and write the input of the next layer."""
        begin, flops = time.monotonic(), 0
        costs: dict[int, int] = {}
        with (
            self.hidden.open_writer(layer + 1) as out,
            self.output_attention_weights(teacher),
            teacher.load_layer(layer),
        ):
            for numbers in self.hidden.rows.split(self.share):
                hidden, positions = self.read_inputs(layer, numbers)
                with CachedFlopCounter(costs, len(numbers)) as count, self.autocast():
                    out.append(teacher.run_layer(hidden, positions))
                flops += count.flops
        distributed.barrier()

        # A layer that runs again because its inputs were lost is not counted twice.
        if layer + 1 > self.state.passed:
            self.state.add_cost(self.state.entry, flops, time.monotonic() - begin)
            self.state.passed = layer + 1
            self.state.save(self.run)

    def train_layer(self, teacher: OneLayerModel, layer: int) -> None:
        """Train one mixer and write it to disk."""
        run, state, begin = self.run, self.state, time.monotonic()
        mixer = load_target_mixer(run, layer).to(run.device)
        with self.output_attention_weights(teacher), teacher.load_layer(layer, mlp=False):
            with build_flop_counter() as closed_form:
                if run.calibration:
                    calibrate_layer(mixer, *self.calibration_records(teacher, layer))
            start_seconds, begin = time.monotonic() - begin, time.monotonic()
            flops = self.run_steps(teacher, mixer, layer, begin)

        self.write_mixer(mixer, layer)
        distributed.barrier()
        state.add_cost(state.entry, flops, time.monotonic() - begin)
        if state.start:
            state.add_cost(state.start, closed_form.get_total_flops(), start_seconds)
        # The mixer is on disk before the state says so: a kill in between trains it again.
        state.add_layer(run, layer)
        state.save(run)

    def exit_process(self) -> NoReturn:
        """End the process as its signal asks. What is kept are whole layers."""
        layers, folder = self.state.trained, self.run.folder
        self.stopping.exit_process(f"layers {layers} in '{folder}' are" if layers else "")

    def run_steps(self, teacher: OneLayerModel, mixer: Mixer, layer: int, begin: float) -> int:
        """Run the stage's steps on one mixer.

        RegraftError when the loss is not finite or has jumped.

        Args:
            teacher: has the weights of the layer's attention.
            mixer: the mixer, whose weights change.
            layer: number of the layer.
            begin: when work on the layer began, by `time.monotonic()`.

        Returns:
            FLOPs of this process.
        """
        run, stage, entry, processes = (
            self.run, self.run.stage, self.state.entry, distributed.world_size()
        )  # fmt: skip
        optimizer = self.build_optimizer(mixer, layer)
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        peak_flops = throughput.measure_peak_flops(run.device, self.fast)
        tokens = stage.batch * stage.length  # of a step
        earlier = self.converted.index(layer) * stage.steps  # steps on the layers before
        costs: dict[int, int] = {}
        trend, flops, tick = LossTrend(), 0, time.monotonic()

        for step, numbers in enumerate(self.mine):
            set_learning_rates(optimizer, stage, step)
            with CachedFlopCounter(costs, len(numbers)) as count:
                loss = self.backward_loss(teacher, mixer, layer, numbers)
            flops += count.flops
            # Gradients and losses here are means over this process's rows.
            loss, stop = all_reduce_step(
                loss * self.share / stage.batch,
                learning,
                self.share / stage.batch,
                self.stopping.is_requested,
            )
            if stop:
                self.exit_process()
            norm = apply_gradients(optimizer, stage.clip)
            self.check_loss(trend, layer, step + 1, loss, norm)

            tick, spent = time.monotonic(), time.monotonic() - tick
            done = earlier + step + 1
            result = StepResult(loss, norm, tokens, count.flops * processes, spent)
            totals: Cost = {
                "tokens": done * tokens,
                "flops": entry["flops"] + flops * processes,
                "seconds": entry["seconds"] + time.monotonic() - begin,
            }
            row = build_step_row(0, stage.kind, done, result, totals, optimizer, peak_flops, layer)
            write_metrics_row(run, row)
            run.progress(stage, done, stage.steps * len(self.converted), row)
        return flops

    def build_optimizer(self, mixer: Mixer, layer: int) -> torch.optim.AdamW:
        """AdamW over one mixer, with the learning rates it would have in the whole model."""
        config = self.run.target.config
        spec, attention = config["mixers"][layer], Attention(**config["attention"][layer])
        origins = mixer_parameter_origins(mixer, spec, attention)
        groups = build_groups(mixer.parameters(), origins, self.run.stage, True)
        return build_optimizer(groups)

    def write_mixer(self, mixer: Mixer, layer: int) -> None:
        """Write a trained mixer under its checkpoint names; the first process does."""
        if not distributed.is_rank0():
            return
        prefix = f"{self.run.target.config['slot'].format(layer)}.mixer"
        values = {
            f"{prefix}.{name}": parameter.detach().cpu().contiguous()
            for name, parameter in mixer.named_parameters()
        }
        save_tensors(layer_path(self.run, layer), values)

    def check_loss(self, trend: LossTrend, layer: int, step: int, loss: float, norm: float) -> None:
        """RegraftError when a layer's loss is not finite or has jumped.

        The layers before it stay on disk, which the message says.
        """
        try:
            check_divergence(trend, self.run.spike, self.run.stage, (0, step), loss, norm, list)
        except RegraftError as error:
            done = f"finished layers {self.state.trained} are in '{self.run.folder}'"
            raise RegraftError(f"layer {layer}: {error} ({done})") from None

    def backward_loss(
        self, teacher: OneLayerModel, mixer: Mixer, layer: int, numbers: Tensor
    ) -> float:
        """Backpropagate the mean loss of some rows; returns it."""
        rows = self.read_rows(numbers)
        measure = output_loss if self.run.stage.kind == "align" else matrix_loss
        with self.autocast():
            record = teacher.record_attention(*self.read_inputs(layer, numbers))
            loss = measure(mixer, record, self.segments(rows))
        loss.backward()
        return float(loss.detach())

    def segments(self, rows: Packed) -> Tensor | None:
        """Document numbers of the tokens on the device, (rows, time); None for one document."""
        segments = rows.segments()
        return None if segments is None else segments.to(self.run.device)

    def calibration_records(
        self, teacher: OneLayerModel, layer: int
    ) -> tuple[list[LayerRecord], list[Tensor | None]]:
        """The layer's inputs and outputs on batches for calibration, and the rows' documents."""
        records: list[LayerRecord] = []
        documents: list[Tensor | None] = []
        for numbers in self.calibrating.split(rows_calibrated_together(self.run.stage.length)):
            with self.autocast():
                records.append(teacher.record_attention(*self.read_inputs(layer, numbers)))
            documents.append(self.segments(self.read_rows(numbers)))
        return records, documents

    def read_inputs(self, layer: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states (rows, time, hidden), positions (rows, time)) on the device."""
        hidden = self.hidden.read_rows(layer, numbers)
        positions = self.read_rows(numbers).position_ids
        return hidden.to(self.run.device), positions.to(self.run.device)

    def autocast(self) -> torch.autocast:
        """Inside, the stage's precision."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.fast)

    def output_attention_weights(self, teacher: OneLayerModel) -> AbstractContextManager[None]:
        """Inside, attention layers also give their softmax matrices if the stage needs them."""
        if self.run.stage.kind == "matrix":
            return output_attention_weights(teacher.model)
        return nullcontext()


class CachedFlopCounter:
    """Inside, work runs; afterwards `flops` is what it took.

    It is counted once for each number of rows and then looked up, as the counter is slow.
    """

    def __init__(self, costs: dict[int, int], rows: int):
        """Prepare to count.

        Args:
            costs: FLOPs by number of rows; a new count is added.
            rows: how many rows the work is on.
        """
        self.costs, self.rows, self.flops = costs, rows, costs.get(rows, 0)
        self.counter = None if rows in costs else build_flop_counter()

    def __enter__(self) -> CachedFlopCounter:
        if self.counter is not None:
            self.counter.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.counter is not None:
            self.counter.__exit__(*reason)
            self.flops = self.costs[self.rows] = self.counter.get_total_flops()


def load_target_mixer(run: LayerwiseRun, layer: int) -> Mixer:
    """A layer's mixer with the target's weights, float32, the same in every process."""
    target = run.target
    attention = Attention(**target.config["attention"][layer])
    with torch.device("meta"):
        mixer = build(target.config["mixers"][layer], attention)
    values = {
        role.removeprefix("mixer."): lazy.read().to(run.device, torch.float32, copy=True)
        for (role, at), lazy in target.tensors.items()
        if at == layer and role.startswith("mixer.")
    }
    mixer.load_state_dict(values, assign=True)
    # All processes must start from the same weights.
    for tensor in mixer.parameters() if distributed.world_size() > 1 else ():
        dist.broadcast(tensor.data, 0)
    return mixer


def all_reduce_step(
    loss: float, parameters: list[nn.Parameter], share: float, stop: bool
) -> tuple[float, bool]:
    """Add up a step over all processes.

    Args:
        loss: this process's part of the batch's mean loss.
        parameters: have the gradients of the mean over this process's rows; afterwards, of the
            mean over the whole batch.
        share: this process's share of the batch.
        stop: whether this process was asked to stop.

    Returns:
        (the batch's mean loss, whether any process was asked to stop).
    """
    if distributed.world_size() == 1:
        return loss, stop
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad.mul_(share))
    losses, stops = zip(*distributed.all_gather((loss, stop)), strict=True)
    return sum(losses), any(stops)
