"""GGUF files for llama.cpp's rwkv6qwen2: what it computes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.gguf import save_for_gguf
from helpers.rwkv6qwen2 import SQUARE, make_student, remix, run_file, stir
from helpers.tiny import tokens, write_text

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import find_target
from regraft.export.gguf.writer import read_tensors
from regraft.export.write import write_export
from regraft.mixers.remix import Remix

gguf = pytest.importorskip("gguf")
TARGET = find_target("rwkv6qwen2")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"grouped": False, "shift_rank": 5, "rank": 7}),
    ("qwen2", {"decay": "static", "balance": False, "gate": "none"}),
    ("phi3", {"shift": False}),
]


@torch.no_grad()
def difference(made: Checkpoint, file: Path) -> float:
    """What llama.cpp computes of a file, beside the model, as a share of the largest logit."""
    ids = tokens(1, 90, 260)
    tensors, facts = read_tensors(file), TARGET.prepare(made).metadata
    expected = modeling.materialize(made).double()(ids, use_cache=False).logits[0]
    found = run_file(tensors, facts, ids[0].tolist())
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_the_file_computes_what_the_model_computes(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = make_student(tmp_path / "source", family, **options)
    assert TARGET.find_misfits(made.config) == []
    TARGET.prepare(made).write(tmp_path / "model.gguf", "f32")
    assert difference(made, tmp_path / "model.gguf") < 1e-5
