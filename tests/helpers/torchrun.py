"""Run under torchrun: trains what is asked for, as one process or as many, into a folder of its own
each.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from regraft import distributed, modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.packing import pack, read_documents
from regraft.growth.ligo_options import Ligo
from regraft.growth.sizes_to_steps import Growth
from regraft.train import fit_ligo, fsdp, loop, session
from regraft.train.stage import LAYERWISE, Stage

STEPS, LENGTH, BATCH = 6, 32, 12
SIZE: dict[str, Any] = {"length": LENGTH, "batch": BATCH, "precision": "float32"}
TOKENS = STEPS * LENGTH * BATCH
STAGES = {
    "next": Stage("next", TOKENS, lr_body=1e-4, **SIZE),
    "distil": Stage("distil", TOKENS, lr_new=1e-4, lr_mixer=1e-4, ce=0.2, window_drop=0.3, **SIZE),
    "align": Stage("align", TOKENS, lr_new=1e-4, lr_mixer=1e-4, **SIZE),
    "matrix": Stage("matrix", TOKENS, lr_new=1e-4, lr_mixer=1e-4, **SIZE),
    "rank": Stage("distil", TOKENS, lr_new=1e-4, lr_mixer=1e-3, rank=3, **SIZE),
    "lit": Stage("next", TOKENS, lr_new=1e-4, learn="lit", **SIZE),
}


def train_stage(
    name: str, models: Path, out: Path, hybrid: bool = False, **options: Any
) -> dict[str, Any]:
    """One stage on the models in a folder; the ledger."""
    stage, over = STAGES[name], fsdp.build_mesh(hybrid) if distributed.world_size() > 1 else None
    kinds = ("bare" if name == "matrix" else "linear", "source")
    student, teacher = (Checkpoint.open(models / kind) for kind in kinds)
    model, guide = (
        fsdp.load_sharded(student, over, stage.kind in LAYERWISE),
        fsdp.load_sharded(teacher, over),
    )
    rows = pack(
        read_documents(models / "text.txt"), modeling.load_tokenizer(models / "source"), LENGTH
    )
    slots = modeling.slots(guide, teacher)
    run = loop.Run(
        model, [stage], lambda length: rows, out, guide, slots, heldout=rows[:4], **options
    )
    ledger = loop.train(run)
    session.save_trained(student, model, [stage], ledger, out)
    return ledger


def train_interrupted(name: str, models: Path, out: Path, at: int = STEPS // 2) -> None:
    """The same, given up after so many steps and begun again."""

    def give_up(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        if step == at + 1:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train_stage(name, models, out, save_seconds=0, progress=give_up)
    train_stage(name, models, out)


def train_ligo_maps(models: Path, out: Path) -> dict[str, Any]:
    """LiGO's maps of a wider and deeper model, learned in STEPS steps; losses and the grown model
    are written.
    """
    source = Checkpoint.open(models / "source")
    rows = pack(
        read_documents(models / "text.txt"), modeling.load_tokenizer(models / "source"), LENGTH
    )
    losses: list[float] = []

    def note(step: int, steps: int, row: dict[str, float]) -> None:
        losses.append(row["loss"])

    growth = Growth(hidden=source.sizes["hidden"] + 9, layers=source.layers + 1, width_init="ligo")
    stage = Stage("next", BATCH * LENGTH, **SIZE)
    learned = fit_ligo.fit_maps(
        source, growth, Ligo(steps=STEPS), stage, rows, micro=2, progress=note
    )
    if distributed.is_rank0():
        learned(source).save(out)
        (out / "losses.json").write_text(json.dumps({"loss": losses, **learned.cost}))
    return dict(learned.cost)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, target, *names = sys.argv[1:]
    hybrid = "hybrid" in names
    with distributed.init_distributed():
        for kind in names:
            if kind == "ligo":
                train_ligo_maps(Path(folder), Path(target) / kind)
            elif kind.startswith("broken "):
                train_interrupted(kind.removeprefix("broken "), Path(folder), Path(target) / kind)
            elif kind != "hybrid":
                train_stage(
                    kind,
                    Path(folder),
                    Path(target) / kind,
                    hybrid=hybrid,
                    micro=1 if kind == "next" else 0,
                )
