"""`regraft train` on stock models: what it writes loads with the stock class, a killed command goes
on, bad input.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from helpers.cli import as_json, refused, run_main
from helpers.tiny import SPECIAL, byte_tokenizer, inputs, tiny, write_text

from regraft.core.checkpoint import Checkpoint
from regraft.core.moments import FILE as MOMENTS_FILE
from regraft.growth import optimizer_state
from regraft.train import loop

WORDS = len(SPECIAL) + 256 + 1


def masking() -> Any:
    """The byte tokenizer with a mask token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by kind, a text and images."""
    folder = tmp_path_factory.mktemp("train")
    for name, family in {"next": "qwen2", "mask": "roberta", "teacher": "llama"}.items():
        tiny(family, vocab=WORDS, **({"max_position_embeddings": 70} if name == "mask" else {}))[
            1
        ].save_pretrained(folder / name)
        masking().save_pretrained(folder / name)
    config, model = tiny("vit")
    model.save_pretrained(folder / "image")
    write_text(folder / "text.txt")
    pixels = inputs(config, 12)["pixel_values"].numpy()
    numpy.savez(folder / "images.npz", pixel_values=pixels, labels=numpy.arange(12) % 7)
    numpy.savez(folder / "beyond.npz", pixel_values=pixels, labels=numpy.arange(12))
    numpy.savez(
        folder / "small.npz", pixel_values=pixels[:, :, :10, :10], labels=numpy.arange(12) % 7
    )
    numpy.savez(folder / "bare.npz", pixel_values=pixels)
    return folder


def words(folder: Path, kind: str, out: Path, data: str = "", **flags: Any) -> list[object]:
    data = data or ("images.npz" if kind == "image" else "text.txt")
    size = (
        {"tokens": 20, "batch": 4} if kind == "image" else {"tokens": 640, "length": 64, "batch": 2}
    )
    flags = size | {"stage": kind, "data": folder / data, "lr-body": 1e-3} | flags
    model = folder / ("next" if kind == "distil" else kind)
    return [
        "train",
        model,
        out,
        *(word for flag, value in flags.items() for word in (f"--{flag}", value)),
    ]


@pytest.mark.parametrize("kind", ["next", "mask", "image", "distil"])
def test_a_stock_model_is_trained_and_stays_stock(kind, folder, tmp_path, capsys, monkeypatch):
    flags = {"heldout": folder / ("images.npz" if kind == "image" else "text.txt"), "every": 2}
    if kind == "distil":
        flags["teacher"] = folder / "teacher"
    command = [*words(folder, kind, tmp_path / "out", **flags), "--keep-moments"]
    table = as_json(capsys, *command)
    assert table["tokens"] == (20 if kind == "image" else 640) and table["flops"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads(
        (folder / ("next" if kind == "distil" else kind) / "config.json").read_text()
    )
    assert (
        config["architectures"] == before["architectures"]
        and config["model_type"] == before["model_type"]
    )
    trained = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(
        trained[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    seen = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in seen] == [0, 2, 4, 5]
    assert kind == "distil" or seen[-1]["eval_loss"] < seen[0]["eval_loss"]
    assert optimizer_state.read_moments(
        Checkpoint.open(tmp_path / "out"), tmp_path / "out" / MOMENTS_FILE
    )

    kind_of_model, original = (
        getattr(transformers, config["architectures"][0]),
        loop.write_metrics_row,
    )
    whole = kind_of_model.from_pretrained(tmp_path / "out").state_dict()
    for seconds in (0.0, 60.0):  # cut off with a checkpoint and before the first one
        command[2] = tmp_path / f"cut{seconds}"
        written = []

        def killing(run: Any, row: dict, written: list = written) -> None:
            written.append(row)
            if len(written) > 4:
                raise KeyboardInterrupt
            original(run, row)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "Run", partial(loop.Run, save_seconds=seconds))
            patched.setattr(loop, "write_metrics_row", killing)
            assert (
                run_main(capsys, *command)[0] == 130 and not (command[2] / "config.json").exists()
            )
        as_json(capsys, *command)
        again = kind_of_model.from_pretrained(command[2]).state_dict()
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_training_goes_on_from_kept_moments(folder, tmp_path, capsys):
    as_json(capsys, *words(folder, "next", tmp_path / "a"), "--keep-moments")
    command = words(folder, "next", tmp_path / "b", moments=tmp_path / "a" / MOMENTS_FILE)
    command[1] = tmp_path / "a"
    assert as_json(capsys, *command)["tokens"] == 640


CASES = [
    ("image", {"data": "text.txt"}, "cannot read '.*text.txt' as images: give a .npz"),
    ("next", {"data": "images.npz"}, "cannot read '.*images.npz' as text"),
    ("image", {"data": "bare.npz"}, "no array 'labels'"),
    ("image", {"data": "beyond.npz"}, "label 11 is none of the model's 7 classes"),
    ("image", {"data": "small.npz"}, r"images are \[3, 10, 10\] .* takes \[3, 15, 15\]"),
    ("mask", {"length": 80}, "rows of 80 tokens in a roberta: give 1 to"),
    ("next", {"stage": "mask"}, "Qwen2ForCausalLM has no head for 'mask'"),
    ("mask", {"stage": "next"}, "RobertaForMaskedLM has no head for 'next'"),
    ("mask", {"stage-options": '{"mask_share": 1.5}'}, "mask_share is 1.5"),
    ("next", {"batch": 0}, "0 rows of 64"),
    ("next", {"every": 3}, "--every 3 .* --heldout PATH"),
    ("next", {"moments": "nowhere.safetensors"}, "cannot read 'nowhere.safetensors'"),
    ("next", {"layers": "bottom:9"}, "layers 'bottom:9' of a model with layers 0 to 2"),
    ("next", {"layers": "top:2"}, "layers is 'top:2'"),
    ("next", {"stage-options": '{"layer_drop": 1}'}, "give shares from 0, below 1"),
    ("image", {"tokens": 2}, "has 2 images, less than one step of 4 x 1"),
]


@pytest.mark.parametrize(("kind", "flags", "says"), CASES, ids=[case[2][:25] for case in CASES])
def test_bad_input_is_one_line(kind, flags, says, folder, tmp_path, capsys):
    import re

    assert re.search(says, refused(capsys, *words(folder, kind, tmp_path / "out", **flags)))


def test_a_tokenizer_without_mask_token_is_refused(folder, tmp_path, capsys):
    tiny("bert", vocab=WORDS, max_position_embeddings=70)[1].save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    command = words(folder, "mask", tmp_path / "out")
    command[1] = tmp_path / "bert"
    assert "has no mask token" in refused(capsys, *command)
