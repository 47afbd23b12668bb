"""Saved models in a process of their own: loaded by the code beside them, several at once, and found by
the auto classes in any order of imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers.tiny import save_model, tiny
from helpers.wrappers import build_wrapper
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    modeling_utils,
)

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix

PROGRAM = Path(__file__).parents[1] / "helpers" / "without_regraft.py"
IDS = torch.arange(3, 33).unsqueeze(0)
# Name of a case -> where its model is saved. Two folders of one name, as checkpoints often have.
FOLDERS = {"first": "one/model", "second": "two/model", "other host": "three"}
IMAGES = "images"  # of a model that reads them


def load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    assert modeling  # imported: its classes are registered
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


def train(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()


def make_models(place: Path) -> None:
    """What the program loads: folders, `cases.json` and `expected.pt`."""
    cases: dict[str, dict[str, Any]] = {}
    expected: dict[str, torch.Tensor] = {}

    def add(name: str, model: PreTrainedModel, saved: str = "", **options: Any) -> None:
        auto = type(model).host_auto_class.__name__
        cases[name] = {"folder": saved or name, "auto": auto, "options": options}
        with torch.no_grad():
            expected[name] = model(input_ids=IDS).logits

    sources = {"llama": save_model(place / "llama", layers=3), "qwen3": place / "qwen3"}
    tiny("qwen3")[1].save_pretrained(sources["qwen3"])
    Remix("gated_deltanet", "0", window=8, sinks=2)(Checkpoint.open(sources["llama"])).save(
        place / FOLDERS["first"]
    )
    Remix("supra", "none", window=0)(Checkpoint.open(sources["llama"])).save(
        place / FOLDERS["second"]
    )
    Remix("rwkv6", "1", window=8, options={"decay": "static", "grouped": True})(
        Checkpoint.open(sources["qwen3"])
    ).save(place / FOLDERS["other host"])
    for name, folder in FOLDERS.items():
        add(name, load(place / folder), folder)

    build_wrapper("qwen2_5_vl")[1].save_pretrained(place / "whole")
    Remix("gla", "0", window=8)(Checkpoint.open(place / "whole")).save(place / IMAGES)
    add(IMAGES, load(place / IMAGES, AutoModelForImageTextToText))

    first = place / FOLDERS["first"]
    model = load(first)
    train(model)
    model.save_pretrained(place / "trained", max_shard_size="20KB")
    assert len(list((place / "trained").glob("*.safetensors"))) > 1
    add("trained", model)
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    model.save_pretrained(place / "resized", variant="new")
    add("resized", model, variant="new")

    model = load(first).bfloat16()
    model.save_pretrained(place / "bfloat16")
    add("bfloat16", load(place / "bfloat16"))
    model = load(first, num_hidden_layers=2)
    model.save_pretrained(place / "fewer")
    add("fewer", model)
    model = load(first, AutoModelForSequenceClassification, num_labels=4, pad_token_id=0)
    model.save_pretrained(place / "classifier")
    add("classifier", model)
    model = load(first, AutoModelForTokenClassification, num_labels=3)
    model.save_pretrained(place / "tagger")
    add("tagger", model)
    (place / "cases.json").write_text(json.dumps(cases))
    torch.save(expected, place / "expected.pt")


def test_in_a_process_of_their_own(tmp_path: Path) -> None:
    make_models(tmp_path)
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HOME": str(tmp_path),
        "PATH": "",
        "PYTHONPATH": str(Path(modeling.__file__).parents[2]),
    } | {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "OMP_NUM_THREADS")}
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    failed = json.loads((tmp_path / "failed.json").read_text())
    if failed:
        print(printed.stderr)
        pytest.fail("\n".join(f"{name}: {error}" for name, error in failed.items()))


def test_code_is_uploaded_with_the_model(
    linearized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub takes what was written when `save_pretrained` asks for it."""
    uploaded: list[str] = []

    def upload(self: Any, folder: Any, repo: str, times: dict[str, float], **others: Any) -> None:
        uploaded.extend(file.name for file in Path(folder).iterdir() if file.name not in times)

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(modeling_utils, "hf_api", MagicMock())
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", MagicMock())
    load(linearized).save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="some/model")
    assert {"config.json", "model.safetensors", "modeling_regraft.py"} <= set(uploaded)
