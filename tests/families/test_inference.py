"""Tables inferred from stock classes: they agree with the written ones, a proof catches wrong ones,
and unknown types grow and are linearized by them.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import GROWABLE, tiny

import regraft
from regraft.checks import table_proof
from regraft.checks.check import check
from regraft.cli.main import main
from regraft.core.anatomy import Anatomy, find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.core.part import PlacedPart
from regraft.errors import RegraftError
from regraft.families.inference import inferred, table_file
from regraft.families.inference.infer import infer_tables
from regraft.families.inference.table import InferredTable, build_anatomy
from regraft.families.inference.tiny_model import TinyModel, find_tiny_model
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen

ENCODERS = ("bert", "roberta", "vit", "dinov2")
DECODERS = [family for family in GROWABLE if family not in ENCODERS]
# Types without a table -> whether their attention can be linearized.
UNKNOWN = {"granite": True, "olmo3": False, "qwen3_moe": True, "glm4": False, "stablelm": True}


def describe(anatomy: Anatomy, config: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What a table says of every tensor, by its name in a file and without role names."""
    return {
        anatomy.name_in_file(one.name): describe_part(anatomy, config, one)
        for one in anatomy.place(config).values()
    }


def describe_part(anatomy: Anatomy, config: dict[str, Any], placed: PlacedPart) -> tuple[Any, ...]:
    part, axes = placed.part, placed.part.axes
    writes = part.writes if any("hidden" in output for output in axes.outputs) else None
    reads = part.reads if "hidden" in axes.inputs or part.norm else None
    # A head reads what the final norm gives, whatever that is called.
    reads = "normed" if reads == "head" else reads
    stored = part.stored if axes.kind == "map" else None
    return (axes.kind, axes.inputs, axes.outputs, axes.unit, stored, part.norm, reads, writes)


@pytest.mark.parametrize("family", DECODERS)
def test_inference_agrees_with_the_written_table(family: str) -> None:
    config = tiny(family)[0].to_dict()
    written = find_anatomy(config)
    table = next(infer_tables(find_tiny_model(config)))
    found = build_anatomy(table, config)
    assert describe(found, config) == describe(written, config)
