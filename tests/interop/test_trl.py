"""TRL's trainers on a linearized model."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from regraft import modeling

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("default")

TEXTS = ["the quick brown fox jumps", "a dog", "over one lazy dog and a cat", "some text"]


def load(folder: Path) -> PreTrainedModel:
    assert modeling  # imported: its classes are registered
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def options(out: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": out, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0,
        "per_device_train_batch_size": 4, **others,
    }  # fmt: skip


def check_trained(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """Every layer has moved, and the result loads."""
    model.save_pretrained(out)
    before, after = load(folder), load(out)
    for old, new in zip(before.slots(), after.slots(), strict=True):
        pairs = zip(old.parameters(), new.parameters(), strict=True)
        assert not all(torch.equal(*pair) for pair in pairs)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokenizer: Any) -> float:
    """Of each text alone, per token that is predicted."""
    rows = [tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids for text in TEXTS]
    losses = [float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in rows]
    return sum(losses) / sum(row.shape[1] - 1 for row in rows)


@pytest.mark.parametrize("packing", [False, True])
def test_sft(linearized: Path, tmp_path: Path, packing: bool) -> None:
    """Its loss is that of the texts alone, padded or packed."""
    model, tokenizer = load(linearized), AutoTokenizer.from_pretrained(linearized)
    wanted = mean_loss(model, tokenizer)
    arguments = trl.SFTConfig(
        **options(tmp_path / "run", learning_rate=1e-2), packing=packing, max_length=64
    )
    data = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-3)
    check_trained(trainer.model, linearized, tmp_path / "out")


def test_dpo(linearized: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(linearized)
    rows = {
        "prompt": ["the fox", "a"],
        "chosen": [" jumps", " dog"],
        "rejected": [" sleeps", " cat, i think"],
    }
    arguments = trl.DPOConfig(**options(tmp_path / "run", max_steps=3, learning_rate=1e-2))
    trainer = trl.DPOTrainer(
        str(linearized), args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The reference is a copy: it agrees at first.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0] - 1e-3
    check_trained(trainer.model, linearized, tmp_path / "out")


def test_reward(linearized: Path, tmp_path: Path) -> None:
    """A classifier with one output."""
    rows = {"chosen": ["the fox jumps", "a dog"], "rejected": ["the fox sleeps", "a cat, i think"]}
    arguments = trl.RewardConfig(**options(tmp_path / "run", max_steps=3, learning_rate=1e-2))
    trainer = trl.RewardTrainer(
        str(linearized), args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(linearized),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1e-3
    trainer.save_model(tmp_path / "out")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.num_labels == 1
    assert torch.equal(saved.score.weight, trainer.model.score.weight)


def test_grpo(linearized: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(linearized, padding_side="left")
    arguments = trl.GRPOConfig(
        **options(tmp_path / "run", learning_rate=1e-2),
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
    )

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [float(number) for number, _ in enumerate(completions)]

    trainer = trl.GRPOTrainer(
        load(linearized), reward, arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
    )  # fmt: skip
    trainer.train()
    check_trained(trainer.model, linearized, tmp_path / "out")


ORDER = """
import sys
import regraft, trl
from trl import DPOTrainer, SFTTrainer
import regraft.modeling
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
assert isinstance(model, regraft.modeling.RegraftForCausalLM)
"""


def test_imported_before_the_classes_are_registered(linearized: Path) -> None:
    command = [sys.executable, "-c", ORDER, str(linearized)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
