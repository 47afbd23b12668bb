"""Alignment layer by layer: what a run needs, how far it has come, what it keeps on disk."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Never, TypedDict

import torch

from ... import distributed
from ...core.checkpoint import Checkpoint
from ...data.rows import Table
from ...errors import RegraftError
from ...io import safetensors
from ...io.files import read_json_lines, read_own_json, write_json, write_json_lines
from ...io.identity import identify_model
from ...io.schema import build
from ...mixers.older_names import rename_older
from ..checkpoint_files import hash_file
from ..divergence import LossSpikeConfig
from ..output import WORK, check_settings
from ..precision import use_bfloat16
from ..records import Cost, LedgerEntry, StartCost, StepRow
from ..run import StepCallback
from ..stage import LAYERWISE, Stage

FOLDER = WORK / "stream"  # in the output folder: what a run needs to be resumed


@dataclass(frozen=True)
class LayerwiseRun:
    """One stage `align` or `matrix` that goes through the model layer by layer.

    Neither model is ever whole in memory. Rows, their order, loss, parameter groups and schedule
    are those of `loop.train`; only gradients are clipped layer by layer. Under torchrun each
    process takes its part of each batch.

    Attributes:
        source: the teacher.
        target: the linearized model whose mixers are trained, as `Remix` makes it of `source` or
            read from disk.
        stage: what to train, and how long.
        rows: the text.
        out: the output folder.
        seed: of the rows' order.
        calibration: rows for the closed-form start, 0 for none.
        scratch: folder for the hidden states of two layers; None for `out/stream`. One in
            /dev/shm keeps them in memory.
        keep: precision of these, float32 or bfloat16.
        progress: as in `loop.Run`; steps and tokens of its rows count over all layers.
        spike: as in `loop.Run`.
        track: as in `loop.Run`.
        device: where the layer computes.
    """

    source: Checkpoint
    target: Checkpoint
    stage: Stage
    rows: Table
    out: Path
    seed: int = 0
    calibration: int = 0
    scratch: Path | None = None
    keep: str = "float32"
    progress: StepCallback = lambda stage, step, steps, row: None
    spike: LossSpikeConfig = LossSpikeConfig()
    track: Callable[[Any], None] = lambda row: None
    device: torch.device = field(default_factory=distributed.device)

    @property
    def folder(self) -> Path:
        """The folder for what the run needs to be resumed."""
        return self.out / FOLDER

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {
            "seed": self.seed,
            "calibration": self.calibration,
            "keep": self.keep,
            "mixers": self.target.config["mixers"],
            "stage": dataclasses.asdict(self.stage),
            "inputs": {
                "model": identify_model(self.target.origin),
                "teacher": identify_model(self.source.origin),
                "data": {"rows": self.rows.digest},
            },
        }


def check_layerwise_run(run: LayerwiseRun) -> None:
    """RegraftError when a run cannot go layer by layer."""
    check_layerwise_stage(run.stage)
    check_layerwise_models(run.source, run.target)

    if run.stage.batch % distributed.world_size():
        raise RegraftError(
            f"{run.stage.batch} rows a step cannot be shared by {distributed.world_size()} "
            "processes: give a multiple"
        )
    positions = run.source.sizes.get("pos", run.stage.length)
    if run.rows.length > positions:
        raise RegraftError(
            f"rows of {run.rows.length} tokens are longer than the model's {positions} positions"
        )


def check_layerwise_stage(stage: Stage) -> None:
    """RegraftError when a stage needs more than one layer at a time."""
    if stage.kind not in LAYERWISE:
        raise RegraftError(
            f"stage '{stage.kind}' needs the whole model: stream one of {', '.join(LAYERWISE)}"
        )
    if (stage.layers, stage.layer_drop, stage.token_drop) != ("all", 0, 0):
        raise RegraftError(
            f"layers '{stage.layers}' and drops are for models without mixers: train all layers"
        )
    if stage.learn == "lit" or stage.window_drop:
        raise RegraftError(
            f"learn '{stage.learn}' and window_drop {stage.window_drop} look at all layers "
            "of a step: stream without"
        )


def check_layerwise_models(source: Checkpoint, target: Checkpoint) -> None:
    """RegraftError when the target is no linearization, with a mixer, of the source."""
    kinds = source.config["model_type"], target.config["model_type"]
    if kinds[1] != "regraft" or kinds[0] == "regraft":
        raise RegraftError(
            f"streaming from a {kinds[0]} to a {kinds[1]}: "
            "give a stock teacher and a linearized model"
        )
    if target.anatomy.host_config(target.config)["model_type"] != kinds[0] or not any(
        target.config["mixers"]
    ):
        raise RegraftError(
            f"'{target.origin}' is no linearization of '{source.origin}' with a mixer: "
            "give its own source"
        )


class LayerwiseFile(TypedDict):
    """The contents of `stream/state.json`: a `LayerwiseState` and the run's settings."""

    passed: int
    trained: list[int]
    entry: LedgerEntry
    start: StartCost | dict[str, Never]  # empty without one
    settings: dict[str, Any]


@dataclass(kw_only=True)
class LayerwiseState:
    """How far a run has come; written to `stream/state.json`.

    Attributes:
        passed: the last layer whose input is paid for in `entry`.
        trained: layers whose mixer is on disk.
        entry: the ledger's entry.
        start: what the closed-form start took; None without one.
        snapshots: what the fields above were after each trained layer, with its file's sha256.
    """

    passed: int = 0
    trained: list[int] = field(default_factory=list)
    entry: LedgerEntry
    start: StartCost | None = None
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, run: LayerwiseRun) -> LayerwiseState:
        """The state in `out`, or a new one; the same for all processes.

        RegraftError when it is of a run with other settings.
        """

        def read_facts() -> Any:
            file = run.folder / "state.json"
            if not file.exists():
                return None
            facts = read_own_json(file, LayerwiseFile, f"remove '{run.folder}' to begin again")
            check_settings(run.out, facts["settings"], run.settings, remove="it")
            return facts

        facts = distributed.on_rank0(read_facts)
        if facts is None:
            return cls.create(run)
        state: LayerwiseState = build(cls, facts | {"start": facts["start"] or None})
        return state.drop_damaged(run)

    @classmethod
    def create(cls, run: LayerwiseRun) -> LayerwiseState:
        """The state of a run that starts."""
        fast = use_bfloat16(run.stage, run.device)
        entry: LedgerEntry = {
            "stage": 0,
            "kind": run.stage.kind,
            "precision": "bfloat16" if fast else "float32",
            "streamed": True,
            "tokens": 0,
            "flops": 0,
            "seconds": 0.0,
            "flops_per_step": 0,
        }

        if not run.calibration:
            return cls(entry=entry)
        tokens = run.calibration * run.rows.length
        start: StartCost = {"kind": "closed form", "tokens": tokens, "flops": 0, "seconds": 0.0}
        return cls(entry=entry, start=start)

    def add_layer(self, run: LayerwiseRun, layer: int) -> None:
        """Record that a layer's mixer is on disk; all processes call it together."""
        self.trained.append(layer)
        digest = distributed.on_rank0(lambda: hash_file(layer_path(run, layer)))
        now = dataclasses.asdict(self)
        del now["snapshots"]
        self.snapshots.append(now | {"sha256": digest})

    def drop_damaged(self, run: LayerwiseRun) -> LayerwiseState:
        """The state before the first trained layer whose file is not as it was written.

        The first process says so on standard error. All layers from there on are trained again.
        """
        whole = distributed.on_rank0(lambda: self.count_whole(run))
        if whole == len(self.trained):
            return self
        if distributed.is_rank0():
            file = layer_path(run, self.trained[whole])
            print(f"regraft: '{file}' is damaged: training again from its layer", file=sys.stderr)
        if whole == 0:
            return LayerwiseState.create(run)
        before = {key: value for key, value in self.snapshots[whole - 1].items() if key != "sha256"}
        return LayerwiseState(**before, snapshots=self.snapshots[:whole])

    def count_whole(self, run: LayerwiseRun) -> int:
        """How many trained layers, from the first on, have the files that were written."""
        pairs = list(zip(self.trained, self.snapshots, strict=False))
        for index, (layer, snapshot) in enumerate(pairs):
            file = layer_path(run, layer)
            if not file.is_file() or hash_file(file) != snapshot["sha256"]:
                return index
        return len(pairs)

    def save(self, run: LayerwiseRun) -> None:
        """Write the state; the first process does."""
        if distributed.is_rank0():
            facts = dataclasses.asdict(self) | {"start": self.start or {}}
            write_json(run.folder / "state.json", facts | {"settings": run.settings})

    def add_cost(self, cost: Cost, flops: int, seconds: float) -> None:
        """Add to `entry` or `start`, the same in every process.

        Args:
            cost: what to add to.
            flops: this process's FLOPs.
            seconds: what this process took; those of the first count.
        """
        cost["flops"] += sum(distributed.all_gather(flops))
        cost["seconds"] += distributed.broadcast(seconds)

    def trim_metrics(self, file: Path) -> None:
        """Drop the rows of layers that are not on disk, which will be trained again.

        A last line cut short by a kill is dropped too. The first process does it.
        """
        if distributed.is_rank0() and file.exists():
            rows = read_json_lines(file, StepRow)
            write_json_lines(file, [row for row in rows if row.get("layer") in self.trained])


def layer_path(run: LayerwiseRun, layer: int) -> Path:
    """The file with a trained mixer."""
    return run.folder / f"layer-{layer}.safetensors"


def build_trained_checkpoint(run: LayerwiseRun, ledger: Mapping[str, Any]) -> Checkpoint:
    """The target with the trained mixers on disk. Each tensor is read when it is saved."""
    entries: dict[str, safetensors.TensorEntry] = {}
    for layer, spec in enumerate(run.target.config["mixers"]):
        if spec:
            file = layer_path(run, layer)
            entries |= {rename_older(one.name): one for one in safetensors.read_header(file)}

    step = {
        "step": "Train",
        "arguments": {"stages": [dataclasses.asdict(run.stage)], "streamed": True},
        "ledger": ledger,
    }
    return run.target.with_readers({name: entry.read for name, entry in entries.items()}, step)
