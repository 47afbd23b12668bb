"""Between the training loop and the disk: text to rows, calibration kept for a restart, the trained checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.corpus import Text, TextMixture
from ..data.packing import read_images
from ..errors import RegraftError
from ..io.files import read_json_if_exists, write_json
from ..modeling import flops
from ..progress import Ticker
from . import fsdp, loop, trackers
from .calibrate import calibrate
from .monitor import DEFAULT_MONITORING, MonitorConfig, summarize_stages
from .objectives import Data
from .stage import LAYERWISE, Stage
from .teacher_cache import CachedTeacher, Teacher, TeacherCacheConfig

TEXT = "run.text"  # tokens of a run's text, in its folder until it ends


def training_rows(
    texts: Sequence[Text],
    tokenizer: Any,
    need: int = 0,
    own: Path | None = None,
    cache: Path | None = None,
    tell: Callable[[float, str], None] = lambda share, words: None,
) -> TextMixture:
    """Rows by length, each text in its share: the largest set of rows, none repeated, in which the shares hold.

    `need`: tokens of the largest stage; `own`: the run's folder for text; `cache`: one that keeps tokens longer.
    RegraftError when there is no text or a share is not positive.
    """
    return TextMixture(texts, tokenizer, need, own, cache, tell)


def calibrate_once(
    student: nn.Module,
    teacher: nn.Module,
    teacher_slots: Sequence[nn.Module],
    batches: list[Any],
    work: Path,
    ticker: Ticker,
) -> dict[str, Any] | None:
    """Give the student its closed-form start from `batches` (none: leave it), or the one an earlier run kept.

    Returns what it cost: `tokens`, `flops`, `seconds`.
    """
    file, costs = work / "calibrated.safetensors", work / "calibrated.json"
    if not batches:
        return None
    if not file.exists():
        begin = time.monotonic()
        with flops.build_flop_counter() as counter:
            for _ in calibrate(
                modeling.slots(student), teacher, list(teacher_slots), batches, ticker.update
            ):
                pass
        work.mkdir(parents=True, exist_ok=True)
        spent = {
            "tokens": sum(batch[0].numel() for batch in batches),
            "flops": counter.get_total_flops(),
        }
        write_json(costs, spent | {"seconds": round(time.monotonic() - begin, 3)})
        part = file.with_suffix(".part")
        save_file(
            {name: tensor.contiguous() for name, tensor in mixer_weights(student).items()}, part
        )
        part.replace(file)
    values = load_file(file)
    with torch.no_grad():
        for name, parameter in mixer_weights(student).items():
            fsdp.local_part(parameter).copy_(fsdp.shard_like(values[name], parameter))
    known: dict[str, Any] = read_json_if_exists(costs)
    return known


def mixer_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters inside converted layers, by number of the layer and name."""
    pairs = zip(modeling.slots(model), model.config.mixers, strict=True)
    return {
        f"{layer}.{name}": parameter.data
        for layer, (slot, spec) in enumerate(pairs)
        if spec is not None
        for name, parameter in slot.named_parameters()
    }


def save_trained(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    stages: Sequence[Stage],
    ledger: dict[str, Any],
    out: Path,
) -> None:
    """Write the trained weights as the checkpoint they came from, into `out`, which may hold other files of the run.

    Everything is written beside first; config.json moves last, so a directory that looks like a model is whole. The
    first process gathers the weights of all and writes.
    """
    values = (
        modeling.to_checkpoint_names(model, fsdp.gather_state_dict(model))
        if distributed.is_rank0()
        else fsdp.gather_state_dict(model)
    )
    if distributed.is_rank0():
        write_trained(checkpoint, values, stages, ledger, out)
    distributed.barrier()


def write_trained(
    checkpoint: Checkpoint,
    values: Mapping[str, torch.Tensor],
    stages: Sequence[Stage],
    ledger: dict[str, Any],
    out: Path,
) -> None:
    """Values by their names in files, written as the checkpoint and moved into place."""
    step = {
        "step": "Train",
        "arguments": {"stages": [dataclasses.asdict(s) for s in stages]},
        "ledger": ledger,
    }
    folder = out / "work" / "trained"
    checkpoint.with_values(values, step).save(folder, overwrite=True)
    move_model_files(folder, out)


def move_model_files(folder: Path, out: Path) -> None:
    """Move a model's files from a folder beside into `out`, config.json last."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    shutil.rmtree(folder)


def load_for_training(
    path: str, over: fsdp.DeviceMesh | None, layerwise: bool = False
) -> PreTrainedModel:
    """The model at `path` where it is trained: whole, or this process's shards of it."""
    if over is None:
        return modeling.load(path).to(distributed.device())
    checkpoint = Checkpoint.open(path)
    distributed.on_rank0(lambda: str(checkpoint.path))  # a GGUF file is converted by one process
    distributed.on_rank0(checkpoint.verify)
    return fsdp.load_sharded(checkpoint, over, layerwise)


def load_stage_rows(
    data: Text,
    stage: Stage,
    tokenizer: Any,
    own: Path | None = None,
    cache: Path | None = None,
    ticker: Ticker | None = None,
) -> Callable[[int], Data]:
    """Rows by length for a stage: text, or the images of a .npz file."""
    if stage.kind == "image":
        images = read_images(data.path)
        return lambda length: images
    tell = ticker.update if ticker else lambda share, words: None
    return training_rows([data], tokenizer, stage.tokens, own, cache, tell)


def train_saved_model(
    model: str,
    out: str,
    data: Text,
    stage: Stage,
    teacher: str | None,
    seed: int,
    ticker: Ticker,
    heldout: str | None = None,
    watching: MonitorConfig = DEFAULT_MONITORING,
    cache: Path | None = None,
    keeping: TeacherCacheConfig | None = None,
    hybrid: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """One stage on a saved model, written to `out`; called again with the same arguments it goes on where it was.

    `data` and `heldout`: text, or a .npz file of images; its tokens are kept in `cache`, or in `out` until the end.
    `keeping`: where the teacher's outputs are kept; `options`: fields of loop.Run. Returns the ledger, with a summary
    of the stage as `watching.summary` gives it and what came of keeping.
    RegraftError when `out` holds a finished model already, or anything that is no run.
    """
    target = Path(out)
    if (target / "config.json").exists():
        raise RegraftError(
            f"{out} holds a finished model: choose another folder, or delete it to train again"
        )
    names = {file.name for file in target.iterdir()} if target.exists() else set()
    if (
        not names <= {"metrics.jsonl", TEXT, trackers.FILE, trackers.FOLDER, "wandb"}
        and "run" not in names
    ):
        raise RegraftError(f"{out} exists and holds no run: choose another folder or delete it")
    ticker.start(f"reading {model}")
    checkpoint = Checkpoint.open(model)
    family = checkpoint.config["model_type"]
    if stage.kind in LAYERWISE and family != "regraft":
        raise RegraftError(
            f"{model} is a {family} model without mixers, which '{stage.kind}' is for: regraft linearize it first"
        )
    over = fsdp.build_mesh(hybrid) if distributed.world_size() > 1 else None
    student = load_for_training(model, over, stage.kind in LAYERWISE)
    tokenizer = None if stage.kind == "image" else modeling.load_tokenizer(model)
    if keeping and (not teacher or stage.kind not in ("align", "distil")):
        raise RegraftError(
            f"stage '{stage.kind}' with teacher {teacher} has no outputs to keep: leave out the cache"
        )
    guide: Teacher | None = None
    if teacher:
        guide = (
            CachedTeacher(teacher, keeping, lambda path: load_for_training(path, over))
            if keeping
            else load_for_training(teacher, over)
        )
    matched = teacher if stage.kind in LAYERWISE and not keeping else None
    slots = modeling.slots(guide, Checkpoint.open(matched)) if guide is not None and matched else []
    ticker.start("reading data")
    rows = load_stage_rows(data, stage, tokenizer, target / TEXT, cache, ticker)
    held = None
    if heldout:
        whole = dataclasses.replace(data, path=heldout, max_tokens=0)
        held = load_stage_rows(whole, stage, tokenizer, target / TEXT / "heldout", cache, ticker)(
            stage.length
        )[:]
    rows(stage.length)
    ticker.start(stage.kind)

    facts = {
        "model": model,
        "data": data.path,
        "teacher": teacher,
        "seed": seed,
        "stages": [dataclasses.asdict(stage)],
    }
    told: dict[str, Any] = {}
    try:
        with watching.monitor(target, ticker, facts) as watched:
            ledger = loop.train(
                loop.Run(
                    student,
                    [stage],
                    rows,
                    target,
                    guide,
                    slots,
                    seed=seed,
                    heldout=held,
                    **watched,
                    **options,
                ),
            )
    finally:
        if isinstance(guide, CachedTeacher):
            told = {"teacher_cache": guide.flush()}
    if isinstance(rows, TextMixture):
        ledger["text"] = rows.facts()
    save_trained(checkpoint, student, [stage], ledger, target)
    if distributed.is_rank0():
        for folder in ("run", "work", TEXT):
            shutil.rmtree(target / folder, ignore_errors=True)
    return ledger | {"summary": summarize_stages(out), "out": out} | told
