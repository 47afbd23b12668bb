"""What a training run is given, and whether its stages can be run with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import distributed
from ..errors import RegraftError
from ..mixers.gated import GatedMixer
from ..modeling.modeling_regraft import RegraftForCausalLM
from .divergence import LossSpikeConfig
from .fsdp import local_part
from .layer_subset import layer_stack, parse_layers
from .objectives import Data, Rows, check_head
from .stage import LAYERWISE, Stage, projection_names
from .teacher_cache import CachedTeacher, Teacher

Progress = Callable[[Stage, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """Everything a training run needs. `rows` gives the packed text for a row length, or images; `limit` seconds for a
    stage, or None.

    `teacher_slots` are the attention modules of the teacher, for alignment. `heldout` is measured before the first step
    of a stage, at its end and, unless `every` is 0, after every so many steps, with the layers that the stage runs;
    neither its time nor its FLOPs count. `moments`: Adam's state to begin with, a file as `regraft grow
    --optimizer-state` writes it; `keep_moments` leaves the last stage's as `out/optimizer.safetensors`. Order of rows,
    masks and drops follow from seed, stage and step. `jump` says when a loss has gone astray; `track` gets every row of
    metrics.jsonl once it is written.

    Under torchrun every process makes the same Run with models that `sharding.load` gave it. A stage's batch is that of
    all processes; each takes its share of the rows, `micro` at a time (0: all at once), which changes no result.
    `checkpointing`: layers are computed again in the backward pass instead of kept.
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
    jump: LossSpikeConfig = LossSpikeConfig()
    track: Callable[[dict[str, Any]], None] = lambda row: None
    micro: int = 0
    checkpointing: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return local_part(next(self.model.parameters())).device


def check_run(run: Run, stage: Stage) -> None:
    """RegraftError when the model has no head for a stage, no mixers to align, or no fitting teacher."""
    check_head(run.model, stage.objective)
    if stage.kind in LAYERWISE and not isinstance(run.model, RegraftForCausalLM):
        kind = type(run.model).__name__
        raise RegraftError(
            f"stage '{stage.kind}' fits mixers, which a {kind} has not: linearize it first"
        )
    if stage.learn != "all" and not isinstance(run.model, RegraftForCausalLM):
        kind = type(run.model).__name__
        raise RegraftError(
            f"learn '{stage.learn}' is for models with mixers: train all of a {kind}"
        )
    if stage.rank and not (
        isinstance(run.model, RegraftForCausalLM) and projection_names(run.model)
    ):
        raise RegraftError(
            f"rank {stage.rank} adds to projections inside mixers, and there are none: give 0"
        )
    if stage.window_drop and not any(
        isinstance(module, GatedMixer) for module in run.model.modules()
    ):
        raise RegraftError(
            f"window_drop {stage.window_drop} leaves windows out, and no layer has one: linearize with one"
        )
    if (stage.layers, stage.layer_drop, stage.token_drop) != ("all", 0, 0):
        if isinstance(run.model, RegraftForCausalLM):
            raise RegraftError(
                f"layers '{stage.layers}' and drops are for models without mixers: train all layers"
            )
        parse_layers(stage.layers, len(layer_stack(run.model)))
    if stage.batch % (distributed.world_size() * max(1, run.micro)) or run.micro < 0:
        raise RegraftError(
            f"a batch of {stage.batch} does not split over {distributed.world_size()} processes, {run.micro or 'any number of'} "
            "rows at a time: give a multiple"
        )
    if run.teacher is None and stage.kind in (*LAYERWISE, "distil"):
        raise RegraftError(f"stage '{stage.kind}' needs a teacher: give the source model")
    if run.teacher is not None and stage.objective == "next":
        if not isinstance(run.teacher, CachedTeacher):
            check_head(run.teacher, "next")
        if run.teacher.config.vocab_size != run.model.config.vocab_size:
            raise RegraftError(
                f"the teacher has {run.teacher.config.vocab_size} tokens, the model {run.model.config.vocab_size}: "
                "give a teacher with the same tokenizer"
            )


def resume_settings(run: Run) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    begun = {"moments": str(run.moments)} if run.moments else {}
    begun |= (
        {"teacher outputs": run.teacher.keeping.kind}
        if isinstance(run.teacher, CachedTeacher)
        else {}
    )
    return {
        "seed": run.seed,
        "stages": [dataclasses.asdict(stage) for stage in run.stages],
        **begun,
    }
