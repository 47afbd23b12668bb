"""Alignment from the disk to the disk, layer by layer: no model is ever whole in memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ... import distributed, modeling
from ...core.checkpoint import Checkpoint
from ...data.corpus import Text
from ...errors import RegraftError
from ...io.files import read_json_lines
from ...progress import Ticker
from .. import trackers
from ..monitor import DEFAULT_MONITORING, MonitorConfig, summarize_stage
from ..session import TEXT, move_model_files, training_rows
from ..stage import Stage
from . import align
from .state import FOLDER, LayerwiseRun

RUN_FILES = {"metrics.jsonl", "metrics.tmp", FOLDER, TEXT, trackers.FILE, trackers.FOLDER, "wandb"}


def align_saved_model(
    model: str,
    out: str,
    data: Text,
    stage: Stage,
    teacher: str | None,
    seed: int,
    ticker: Ticker,
    scratch: Path | None = None,
    calibration: int = 0,
    watching: MonitorConfig = DEFAULT_MONITORING,
    cache: Path | None = None,
) -> dict[str, Any]:
    """A stage `align` or `matrix` on a linearized model, written to `out`; called again it goes on where it was.

    `scratch`: folder for the hidden states of two layers; `calibration`: tokens for the closed-form start of a model as
    linearize wrote it, 0 for none. Returns the ledger with a summary of every layer. RegraftError when `out` holds
    anything but such a run, or the models and the stage do not fit.
    """
    target = Path(out)
    names = {file.name for file in target.iterdir()} if target.exists() else set()
    if "config.json" in names:
        raise RegraftError(
            f"{out} holds a finished model: choose another folder, or delete it to train again"
        )
    if FOLDER not in names and names - RUN_FILES:
        raise RegraftError(
            f"{out} holds '{min(names - RUN_FILES)}' and no streamed run: choose another folder or delete it"
        )
    if not teacher:
        raise RegraftError(
            f"stage '{stage.kind}' needs a teacher: give --teacher, the source of {model}"
        )
    ticker.start(f"reading {model}")
    source, student = Checkpoint.open(teacher), Checkpoint.open(model)
    for checkpoint in (source, student):
        checkpoint.verify()
    ticker.start("reading data")
    texts = training_rows(
        [data], modeling.load_tokenizer(model), stage.tokens, target / TEXT, cache, ticker.update
    )
    rows = texts(stage.length)
    held = -(-calibration // stage.length)
    facts = {
        "model": model,
        "data": data.path,
        "teacher": teacher,
        "seed": seed,
        "stages": [dataclasses.asdict(stage)],
    }
    ticker.start(f"{stage.kind}, layer by layer")
    with watching.monitor(target, ticker, facts) as watched:
        run = LayerwiseRun(source, student, stage, rows, target, seed, held, scratch, **watched)
        trained, ledger = align.align(run)
    ticker.start(f"writing {out}")
    if distributed.is_rank0():
        trained.save(run.folder / "trained", overwrite=True)
        move_model_files(run.folder / "trained", target)
        shutil.rmtree(run.folder)
        shutil.rmtree(target / TEXT, ignore_errors=True)
    distributed.barrier()
    return ledger | {"text": texts.facts(), "summary": summarize_layers(target), "out": out}


def summarize_layers(out: Path) -> list[dict[str, Any]]:
    """A row for every layer that was trained, as `watching.summary` has one for every stage."""
    layers: dict[int, list[dict[str, Any]]] = {}
    for row in read_json_lines(out / "metrics.jsonl"):
        layers.setdefault(row["layer"], []).append(row)
    found, tokens, seconds = [], 0, 0.0
    for layer, rows in layers.items():
        own = [
            row | {"tokens": row["tokens"] - tokens, "seconds": row["seconds"] - seconds}
            for row in rows
        ]
        found.append({"stage": layer, **summarize_stage(own)} | {"steps": len(rows)})
        tokens, seconds = rows[-1]["tokens"], rows[-1]["seconds"]
    return found
