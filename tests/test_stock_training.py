"""Training stock models: every objective, resumed losses, held-out rows, Adam's state, layers, drops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, tiny
from test_objectives import CLASSIFIERS, images, text

from regraft.errors import RegraftError
from regraft.uptrain import loop
from regraft.uptrain.objectives import Rows
from regraft.uptrain.stages import Stage

FAMILY = {"next": "qwen2", "mask": "bert", "image": "vit", "distil": "gpt2"}


class Killed(Exception):
    """A run cut off."""


def stage(kind: Any, steps: int = 4, **options: Any) -> Stage:
    """Two rows of 24 tokens, or two images, a step."""
    size = 1 if kind == "image" else 24
    return Stage(kind, steps * 2 * size, length=24, batch=2, precision="float32", **options)


def rows_of(kind: str, model: Any) -> Callable[[int], Rows]:
    return lambda length: images(model.config, 7) if kind == "image" else text(7)


def go(out: Path, stages: list[Stage], stop_after: int | None = None, **options: Any) -> tuple[list[dict], Any, dict]:
    """(rows of metrics.jsonl, the model, the ledger) of a run on a fresh copy; Killed after so many steps."""
    kind, done = stages[0].kind, 0
    family = options.pop("family", FAMILY[kind])
    keys = options.pop("keys", {})
    model = tiny(family, architecture=CLASSIFIERS.get(family), **keys)[1]
    teacher = tiny("llama", seed=5)[1] if kind == "distil" else None

    def progress(*told: Any) -> None:
        nonlocal done
        done += 1
        if stop_after is not None and done > stop_after:
            raise Killed

    run = loop.Run(model, stages, rows_of(kind, model), out, teacher, progress=progress, save_seconds=0, **options)
    ledger = loop.train(run)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], model, ledger


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("kind", FAMILY)
def test_resumed_losses_equal_uninterrupted(kind: str, tmp_path: Path) -> None:
    stages = [stage(kind), stage(kind, 3)]
    whole, model, ledger = go(tmp_path / "whole", stages)
    assert len(whole) == 7 and ledger["tokens"] == sum(each.tokens for each in stages)
    assert not same(model, tiny(FAMILY[kind])[1]) and all(entry["flops"] > 0 for entry in ledger["stages"])
    for cut in (2, 5):
        with pytest.raises(Killed):
            go(tmp_path / str(cut), stages, cut)
        again, other, _ = go(tmp_path / str(cut), stages)
        assert timeless(again) == timeless(whole) and same(model, other)


@pytest.mark.parametrize("family", [*set(ARCHITECTURES), "gemma2", "mixtral", "gpt_neox", "phi"])
def test_training_brings_the_loss_down(family: str, tmp_path: Path) -> None:
    kind = {"bert": "mask", "roberta": "mask", "vit": "image", "dinov2": "image"}.get(family, "next")
    rows, _, _ = go(tmp_path, [stage(kind, 30, lr_body=3e-3)], family=family)
    assert sum(row["loss"] for row in rows[-5:]) < 0.9 * sum(row["loss"] for row in rows[:5])
    assert rows[5]["lr"] == pytest.approx(3e-3)


def test_a_model_without_mixers_has_a_rate_of_its_own(tmp_path: Path) -> None:
    rows, _, _ = go(tmp_path, [stage("next", 4, cooldown=0.1)])
    assert rows[0]["lr"] == pytest.approx(3e-4)


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    for kind, family, message in [
        ("mask", "llama", "LlamaForCausalLM has no head for 'mask'"),
        ("distil", "bert", "BertForMaskedLM has no head for 'next'"),
    ]:
        with pytest.raises(RegraftError, match=message):
            go(tmp_path, [stage(kind)], family=family)
    with pytest.raises(RegraftError, match="the teacher has 97 tokens, the model 101"):
        go(tmp_path, [stage("distil")], keys={"vocab": 101})
    model = tiny("llama")[1]
    with pytest.raises(RegraftError, match="fits mixers, which a LlamaForCausalLM has not"):
        loop.train(loop.Run(model, [stage("align")], lambda length: text(), tmp_path, model))
    with pytest.raises(RegraftError, match="mask_share is 0"):
        stage("mask", mask_share=0)
