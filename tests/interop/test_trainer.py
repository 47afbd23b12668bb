"""Hugging Face's Trainer on a linearized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from regraft import modeling

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens, the same in every run."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row >= len(self):
            raise IndexError(row)
        ids = torch.randint(3, 200, (12,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "labels": ids}


def train(linearized: Path, out: Path, resume: Path | None = None, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(linearized, dtype=torch.float32)
    options = {
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(linearized)
    arguments = TrainingArguments(out, **options)
    trainer = Trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_checkpoints_resume_and_load(linearized: Path, tmp_path: Path) -> None:
    assert modeling  # imported: its classes are registered
    whole = train(linearized, tmp_path / "whole")
    first = tmp_path / "whole" / "checkpoint-2"
    again = train(linearized, tmp_path / "again", first, gradient_checkpointing=True)
    weights = dict(again.model.named_parameters())
    start = AutoModelForCausalLM.from_pretrained(linearized).state_dict()
    for name, value in whole.model.named_parameters():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)

    last = tmp_path / "whole" / "checkpoint-4"
    saved = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    assert all(torch.equal(saved.get_parameter(n), p) for n, p in whole.model.named_parameters())
    assert (last / "modeling_regraft.py").is_file()

    found = whole.predict(Rows())  # without the cache, which the model's output holds too
    with torch.no_grad():
        wanted = [saved(input_ids=row["input_ids"][None]).logits[0] for row in Rows()]
    torch.testing.assert_close(torch.tensor(found.predictions), torch.stack(wanted))
