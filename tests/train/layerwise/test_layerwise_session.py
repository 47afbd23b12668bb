"""`regraft train --stream`: what it writes, a command that goes on after a kill, bad input in one
line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.cli import as_json, refused, run_main
from helpers.tiny import write_text

from regraft import modeling
from regraft.train.layerwise import align
from regraft.train.output import WORK


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(source: Path, linearized: Path, text: Path, out: Path, **flags: object) -> list[object]:
    given = {
        "teacher": source,
        "data": text,
        "stage": "align",
        "tokens": 512,
        "length": 64,
        "batch": 2,
    } | flags
    options = [word for flag, value in given.items() for word in (f"--{flag}", value)]
    return ["train", linearized, out, *options, "--stream"]


def test_a_streamed_model_is_that_of_the_plain_command(
    source, linearized, text, tmp_path, capsys
) -> None:
    words = command(source, linearized, text, tmp_path / "streamed")
    table = as_json(capsys, *words)
    assert table["tokens"] == 512 and table["flops"] > 0
    assert [row["stage"] for row in table["summary"]] == [1, 2, 3] and table["summary"][2][
        "tokens"
    ] == 512
    assert sorted(file.name for file in (tmp_path / "streamed").glob("*.safetensors")) == [
        "model.safetensors"
    ]
    assert not (tmp_path / "streamed" / WORK).exists()
    words[2] = tmp_path / "plain"
    as_json(capsys, *words[:-1])
    models = [modeling.load(tmp_path / name).state_dict() for name in ("streamed", "plain")]
    assert (
        max(float((models[0][name] - models[1][name]).abs().max()) for name in models[0]) < 2e-3
    )  # clipped by layer
    assert any(
        not torch.equal(value, modeling.load(linearized).state_dict()[name])
        for name, value in models[0].items()
    )


def test_the_same_command_goes_on(source, linearized, text, tmp_path, capsys, monkeypatch) -> None:
    as_json(capsys, *command(source, linearized, text, tmp_path / "whole", calibration=128))
    words = command(
        source, linearized, text, tmp_path / "cut", scratch=tmp_path / "scratch", calibration=128
    )
    original = align.save_tensors

    def cutting(file: Path, values: dict) -> None:
        if file.name == "layer-2.safetensors":
            raise KeyboardInterrupt
        original(file, values)

    with monkeypatch.context() as patched:
        patched.setattr(align, "save_tensors", cutting)
        assert run_main(capsys, *words)[0] == 130
    assert not (tmp_path / "cut" / "config.json").exists() and list(
        (tmp_path / "scratch").iterdir()
    )
    as_json(capsys, *words)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1] and not list((tmp_path / "scratch").iterdir())
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    as_json(capsys, *words)
    words[words.index("--calibration") + 1] = "64"
    assert "another calibration (128 there, 64 here)" in refused(capsys, *words)


CASES = [
    ({"stage": "distil"}, "'distil' needs the whole model"),
    ({"heldout": "text.txt"}, "holds no whole model: leave out --heldout"),
    ({"teacher": "nowhere"}, "no model at 'nowhere'"),
    ({"batch": 0}, "0 rows of 64"),
    ({"stage-options": '{"layer_drop": 0.5}'}, "drops are for models without mixers"),
]


@pytest.mark.parametrize(("flags", "says"), CASES, ids=[case[1][:20] for case in CASES])
def test_bad_input_is_one_line(flags, says, source, linearized, text, tmp_path, capsys) -> None:
    assert re.search(
        says, refused(capsys, *command(source, linearized, text, tmp_path / "out", **flags))
    )


def test_its_flags_stand_alone_only_with_it(source, linearized, text, tmp_path, capsys) -> None:
    words = command(source, linearized, text, tmp_path / "out", calibration=64)
    assert "give --stream as well" in refused(capsys, *words[:-1])
    words[1] = source
    assert "from a llama to a llama" in refused(capsys, *words)
    (tmp_path / "out" / "notes.txt").parent.mkdir(exist_ok=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds 'notes.txt', which is not of regraft" in refused(capsys, *words)


def test_the_teacher_is_not_loaded_a_second_time(
    source, linearized, text, tmp_path, capsys, monkeypatch
) -> None:
    words = command(
        source,
        linearized,
        text,
        tmp_path / "a",
        stage="distil",
        **{"teacher-cache": tmp_path / "cache"},
    )
    words = words[:-1]
    first = as_json(capsys, *words)
    assert first["teacher_cache"]["computed"] == first["teacher_cache"]["kept"] == 8
    words[2] = tmp_path / "b"
    again = as_json(capsys, *words)
    assert again["teacher_cache"] | {"bytes": 0} == dict(
        read=8, computed=0, kept=0, refused=0, damaged=0, bytes=0
    )
    assert again["flops"] < first["flops"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert "has no outputs to keep" in refused(
        capsys, *words[:2], tmp_path / "c", *words[3:], "--stage", "next"
    )
    assert "kept as 'all'" in refused(
        capsys, *words[:2], tmp_path / "c", *words[3:], "--teacher-cache-kind", "all"
    )
