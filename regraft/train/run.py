"""What a training run is given, and whether its stages can be run with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import distributed
from ..errors import RegraftError
from ..io.identity import identify_file
from ..io.request import Identity
from ..mixers.gated import GatedMixer
from ..modeling.modeling_regraft import RegraftForCausalLM
from .divergence import LossSpikeConfig
from .fsdp import local_part
from .layer_subset import layer_stack, parse_layers
from .metrics import MetricsRow
from .objectives import Data, Rows, check_head
from .optimizer import projection_names
from .records import StepRow
from .stage import LAYERWISE, Stage
from .teacher_cache import CachedTeacher, Teacher

# Called after every step with the stage, the steps done, the stage's steps, and the metrics row.
StepCallback = Callable[[Stage, int, int, StepRow], None]


@dataclass(frozen=True)
class Run:
    """Everything a training run needs.

    The order of rows, masks and drops follow from seed, stage and step. Under torchrun every
    process makes the same Run, with models that `train/fsdp.py` has sharded. A stage's batch is
    that of all processes; each takes its share of the rows.

    Attributes:
        model: the student.
        stages: run one after the other.
        rows: gives the packed text for a row length, or images.
        out: folder for metrics.jsonl and, in `run`, the checkpoints.
        teacher: the source model, for stages that learn from one.
        teacher_slots: the teacher's attention modules, for `align` and `matrix`.
        seed: of everything that is random.
        limit: seconds left for a stage by its number, or None.
        progress: called after every step.
        save_seconds: time between checkpoints.
        heldout: rows that are measured before the first step of a stage and at its end, with the
            layers that the stage runs. Neither the time nor the FLOPs of that count.
        every: measure them after every so many steps too; 0: do not.
        moments: file with Adam's state to begin with, as `regraft grow --optimizer-state`
            writes it.
        keep_moments: leave the last stage's state as `out/optimizer.safetensors`.
        spike: when a loss counts as too high.
        track: gets every row of metrics.jsonl once it is written.
        micro: rows that a process runs at a time, 0 for all; this changes no result.
        checkpointing: compute layers again in the backward pass instead of keeping activations.
        inputs: the identities of model and teacher, which a resumed run must meet again.
    """

    model: PreTrainedModel
    stages: Sequence[Stage]
    rows: Callable[[int], Data]
    out: Path
    teacher: Teacher | None = None
    teacher_slots: Sequence[nn.Module] = ()
    seed: int = 0
    limit: Callable[[int], float | None] = lambda stage: None
    progress: StepCallback = lambda stage, step, steps, row: None
    save_seconds: float = 60.0
    heldout: Rows | None = None
    every: int = 0
    moments: Path | None = None
    keep_moments: bool = False
    spike: LossSpikeConfig = LossSpikeConfig()
    track: Callable[[MetricsRow], None] = lambda row: None
    micro: int = 0
    checkpointing: bool = False
    inputs: Mapping[str, Identity] = field(default_factory=dict)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What must not change between this run and its resumption, ready for JSON.

        All processes must ask for it together. The data is known by its content; it is read now.
        """
        settings: dict[str, Any] = {
            "seed": self.seed,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }
        if isinstance(self.teacher, CachedTeacher):
            settings["teacher outputs"] = self.teacher.keeping.kind

        # Every process tokenizes its part of the text; one hash of it is enough.
        tables = {stage.length: self.rows(stage.length) for stage in self.stages}

        def identify_inputs() -> dict[str, Identity]:
            data = {f"rows of {length}": table.digest for length, table in tables.items()}
            found = {**self.inputs, "data": data}
            if self.heldout is not None:
                found["held-out data"] = {"rows": self.heldout.digest}
            if self.moments and self.moments.is_file():  # reading it refuses a missing file
                found["moments"] = {"file": identify_file(self.moments)}
            return found

        return settings | {"inputs": distributed.on_rank0(identify_inputs)}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return local_part(next(self.model.parameters())).device


def check_run(run: Run, stage: Stage) -> None:
    """Check that a stage can be run with what the run was given.

    RegraftError when the model has no head for it, no mixers to align, or no fitting teacher,
    when the stage's options are for another kind of model, or when the batch does not split.
    """
    check_head(run.model, stage.objective)
    check_mixer_options(run.model, stage)
    check_layer_options(run.model, stage)

    processes = distributed.world_size()
    if stage.batch % (processes * max(1, run.micro)) or run.micro < 0:
        raise RegraftError(
            f"a batch of {stage.batch} does not split over {processes} processes, "
            f"{run.micro or 'any number of'} rows at a time: give a multiple"
        )
    check_teacher(run, stage)


def check_mixer_options(model: PreTrainedModel, stage: Stage) -> None:
    """RegraftError when a stage needs mixers that the model does not have."""
    is_linearized = isinstance(model, RegraftForCausalLM)
    name = type(model).__name__

    # What learns: mixers alone, what is new, or low-rank additions to a mixer's projections.
    if stage.kind in LAYERWISE and not is_linearized:
        raise RegraftError(
            f"stage '{stage.kind}' fits mixers, which a {name} has not: linearize it first"
        )
    if stage.learn != "all" and not is_linearized:
        raise RegraftError(
            f"learn '{stage.learn}' is for models with mixers: train all of a {name}"
        )
    if stage.rank and not (is_linearized and projection_names(model)):
        raise RegraftError(
            f"rank {stage.rank} adds to projections inside mixers, and there are none: give 0"
        )

    # Only a gated layer has a linear branch beside its window.
    if stage.window_drop and not any(isinstance(part, GatedMixer) for part in model.modules()):
        raise RegraftError(
            f"window_drop {stage.window_drop} leaves windows out, and no layer has one: "
            "linearize with one"
        )


def check_layer_options(model: PreTrainedModel, stage: Stage) -> None:
    """RegraftError when a stage selects layers that the model does not have."""
    if (stage.layers, stage.layer_drop, stage.token_drop) == ("all", 0, 0):
        return
    if isinstance(model, RegraftForCausalLM):
        raise RegraftError(
            f"layers '{stage.layers}' and drops are for models without mixers: train all layers"
        )
    parse_layers(stage.layers, len(layer_stack(model)))


def check_teacher(run: Run, stage: Stage) -> None:
    """RegraftError when a stage needs a teacher and has none, or one that does not fit."""
    if run.teacher is None:
        if stage.kind in (*LAYERWISE, "distil"):
            raise RegraftError(f"stage '{stage.kind}' needs a teacher: give the source model")
        return
    if stage.objective != "next":
        return

    if not isinstance(run.teacher, CachedTeacher):  # one behind a cache was checked when opened
        check_head(run.teacher, "next")
    theirs, ours = (one.config.get_text_config().vocab_size for one in (run.teacher, run.model))
    if theirs != ours:
        raise RegraftError(
            f"the teacher has {theirs} tokens, the model {ours}: "
            "give a teacher with the same tokenizer"
        )
