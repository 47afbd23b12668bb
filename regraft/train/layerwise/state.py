"""Alignment that streams layer by layer: what a run is asked for, how far it has come, what it leaves on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import distributed
from ...core.checkpoint import Checkpoint
from ...data.rows import Table
from ...errors import RegraftError
from ...io import safetensors
from ...io.files import append_json_line, read_json, replace_file, write_json, write_text
from ..divergence import LossSpikeConfig
from ..precision import bfloat16_is_faster
from ..run import StepCallback
from ..stage import LAYERWISE, Stage

FOLDER = "stream"


@dataclass(frozen=True)
class LayerwiseRun:
    """One stage `align` or `matrix` that walks over the layers of `source`, the teacher, and trains the mixers of
    `target`, what `Remix` makes of it or a linearized model; neither is ever whole in memory.

    Rows, their order, loss, groups and schedule are those of `loop.train`; gradients are clipped layer by layer.
    `rows` are all on the processor. `calibration`: rows for a closed-form start, 0 for none. `scratch`: where the
    hidden states of two layers are kept, `out/stream` by default, a folder in /dev/shm for memory; `keep`: float32 or
    bfloat16. Under torchrun every process takes its part of each batch. `progress`, `jump`, `track` as in `loop.Run`;
    steps and tokens in rows of metrics count every layer's.
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
    jump: LossSpikeConfig = LossSpikeConfig()
    track: Callable[[dict[str, Any]], None] = lambda row: None
    device: torch.device = field(default_factory=distributed.device)

    @property
    def folder(self) -> Path:
        """What the run keeps for a restart."""
        return self.out / FOLDER

    @property
    def settings(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        own = {
            "seed": self.seed,
            "calibration": self.calibration,
            "keep": self.keep,
            "rows": len(self.rows),
        }
        models = {"source": str(self.source.origin), "mixers": self.target.config["mixers"]}
        return json.loads(json.dumps(own | models | {"stage": dataclasses.asdict(self.stage)}))


def check_layerwise_run(run: LayerwiseRun) -> None:
    """RegraftError when a run cannot be streamed."""
    stage = run.stage
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
            f"learn '{stage.learn}' and window_drop {stage.window_drop} look at all layers of a step: stream without"
        )
    if run.target.config["model_type"] != "regraft" or run.source.config["model_type"] == "regraft":
        kinds = run.source.config["model_type"], run.target.config["model_type"]
        raise RegraftError(
            f"streaming from a {kinds[0]} to a {kinds[1]}: give a stock teacher and a linearized model"
        )
    if run.target.config["host"]["model_type"] != run.source.config["model_type"] or not any(
        run.target.config["mixers"]
    ):
        raise RegraftError(
            f"'{run.target.origin}' is no linearization of '{run.source.origin}' with a mixer: give its own source"
        )
    if stage.batch % distributed.world_size():
        raise RegraftError(
            f"{stage.batch} rows a step cannot be shared by {distributed.world_size()} processes: give a multiple"
        )
    held = run.source.sizes.get("pos", stage.length)
    if run.rows.length > held:
        raise RegraftError(
            f"rows of {run.rows.length} tokens are longer than the model's {held} positions"
        )


@dataclass
class LayerwiseState:
    """How far a run has come. `passed`: the layer whose input was counted last; `trained`: layers on disk; `entry`: the
    ledger's; `start`: what the closed form took, in a row like it."""

    passed: int = 0
    trained: list[int] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, run: LayerwiseRun) -> LayerwiseState:
        """The state in `out`, the same for all processes; RegraftError when it is of another run."""
        file, facts = run.folder / "state.json", None
        if distributed.is_rank0() and file.exists():
            facts = read_json(file)
        facts = distributed.broadcast(facts)
        if facts is None:
            fast = run.stage.precision == "bfloat16"
            if run.stage.precision == "auto":
                fast = distributed.broadcast(bfloat16_is_faster(run.device.type))
            precision = "bfloat16" if fast else "float32"
            head = {"stage": 0, "kind": run.stage.kind, "precision": precision, "streamed": True}
            begun = {
                "kind": "closed form",
                "tokens": run.calibration * run.rows.length,
                "flops": 0,
                "seconds": 0.0,
            }
            entry = head | {"tokens": 0, "flops": 0, "seconds": 0.0, "flops_per_step": 0}
            return cls(entry=entry, start=begun if run.calibration else {})
        if facts.pop("settings") != run.settings:
            raise RegraftError(
                f"'{run.out}' holds a run with other settings: give another output, or remove it"
            )
        return cls(**facts)

    def save(self, run: LayerwiseRun) -> None:
        """Write the state; the first process does."""
        if distributed.is_rank0():
            write_json(
                run.folder / "state.json", dataclasses.asdict(self) | {"settings": run.settings}
            )

    def add_cost(self, row: dict[str, Any], flops: int, seconds: float) -> None:
        """Count work in `entry` or `start`, on every process the same."""
        row["flops"] += sum(distributed.all_gather(flops))
        row["seconds"] += distributed.broadcast(seconds)

    def trim_metrics(self, file: Path) -> None:
        """Take rows of layers that are not on disk out of metrics.jsonl; the first process does."""
        if distributed.is_rank0() and file.exists():
            rows = [
                line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")
            ]
            write_text(
                file, "".join(line for line in rows if json.loads(line)["layer"] in self.trained)
            )


def layer_path(run: LayerwiseRun, layer: int) -> Path:
    """Where a trained mixer is."""
    return run.folder / f"layer-{layer}.safetensors"


def write_layer(file: Path, values: dict[str, Tensor]) -> None:
    """Write a trained mixer, whole or not at all; RegraftError on a full disk."""
    try:
        with replace_file(file) as part:
            save_file(values, part)
    except (OSError, RuntimeError) as error:  # safetensors wraps a full disk in an error of its own
        raise RegraftError(
            f"cannot write '{file}' ({error}): free some space and run the same command again"
        ) from error


def write_metrics_row(run: LayerwiseRun, row: dict[str, Any]) -> None:
    """One more row of metrics.jsonl; the first process writes it."""
    if distributed.is_rank0():
        append_json_line(run.out / "metrics.jsonl", row)
        run.track(row)


def build_trained_checkpoint(run: LayerwiseRun, ledger: dict[str, Any]) -> Checkpoint:
    """The target whose mixers are those on disk, each tensor read when it is saved."""
    values: dict[str, safetensors.TensorEntry] = {}
    for layer, spec in enumerate(run.target.config["mixers"]):
        if spec:
            values |= {
                entry.name: entry for entry in safetensors.read_header(layer_path(run, layer))
            }
    step = {
        "step": "Train",
        "arguments": {"stages": [dataclasses.asdict(run.stage)], "streamed": True},
    }
    return run.target.with_readers(
        {name: entry.read for name, entry in values.items()}, step | {"ledger": ledger}
    )
