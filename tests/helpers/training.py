"""Rows, images and short runs of training, cut off where a test asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.tiny import inputs, tiny, tokens
from regraft.data.images import Images
from regraft.data.rows import Packed
from regraft.train import loop
from regraft.train.objectives import Rows
from regraft.train.stage import Stage

MASK, SPECIAL = 4, (0, 1, 2, 3, 4)


CLASSIFIERS = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}


def text(rows: int = 6, length: int = 24) -> Packed:
    """Rows that begin with a special token; the second document of each begins at 10."""
    ids = tokens(rows, length) + 2
    ids = ids.clamp(5, 96)
    ids[:, 0] = 1
    positions = torch.arange(length).repeat(rows, 1)
    positions[:, 10:] -= 10
    return Packed(ids, positions, torch.full((rows,), length), MASK, SPECIAL)


def images(config: Any, rows: int = 6) -> Images:
    return Images(inputs(config, rows)["pixel_values"], torch.arange(rows) % config.num_labels)


FAMILY = {"next": "qwen2", "mask": "bert", "image": "vit", "distil": "gpt2"}


class Killed(Exception):
    """A run cut off."""


def stage(kind: Any, steps: int = 4, **options: Any) -> Stage:
    """Two rows of 24 tokens, or two images, a step."""
    size = 1 if kind == "image" else 24
    return Stage(kind, steps * 2 * size, length=24, batch=2, precision="float32", **options)


def rows_of(kind: str, model: Any) -> Callable[[int], Rows]:
    return lambda length: images(model.config, 7) if kind == "image" else text(7)


def go(
    out: Path, stages: list[Stage], stop_after: int | None = None, **options: Any
) -> tuple[list[dict], Any, dict]:
    """(rows of metrics.jsonl, the model, the ledger) of a run on a fresh copy; Killed after so many
    steps.
    """
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

    run = loop.Run(
        model,
        stages,
        rows_of(kind, model),
        out,
        teacher,
        progress=progress,
        save_seconds=0,
        **options,
    )
    ledger = loop.train(run)
    return (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
        model,
        ledger,
    )


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def timeless(rows: list[dict]) -> list[dict]:
    speed = ("seconds", "tokens_per_second", "flops_per_second", "peak_share")
    return [{key: value for key, value in row.items() if key not in speed} for row in rows]


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 2

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + ord(letter) % 90 for letter in text] for text in texts]}

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        return ["x" * len(row) for row in ids]


def text_rows(rows: int = 12, length: int = 32) -> Packed:
    ids = tokens(rows, length)
    return Packed(ids, torch.arange(length).expand_as(ids), torch.full((rows,), length))
