"""Ways to linearize: each builds, divides its budget, trains and goes on after a kill; what they
will not do.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.cli import as_json, refused, run_main
from helpers.tiny import save_model, tiny, write_text

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.evaluation.baselines import remix_of
from regraft.linearize import methods
from regraft.linearize.method import expand_method
from regraft.linearize.pipeline import check_row_lengths
from regraft.mixers.remix_options import RemixOptions
from regraft.recipes import schema
from regraft.train import loop
from regraft.train.output import WORK
from regraft.train.stage import Stage

NAMES = methods.list_methods()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("methods")
    save_model(place / "model")
    write_text(place / "text.txt", documents=12)
    return place


def words(folder: Path, method: str, out: Path, *more: object) -> list[object]:
    text = folder / "text.txt"
    plain = ["linearize", folder / "model", out, "--method", method, "--data", text]
    if methods.find_method(method).remix.window:
        plain += ["--window", 16]
    return [*plain, "--tokens", 1024, "--length", 64, "--json", *more]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_where_it_comes_from_and_divides_its_budget(name: str) -> None:
    method = methods.find_method(name)
    assert "arXiv" in (importlib.import_module(f"regraft.linearize.methods.{name}").__doc__ or "")
    stages = method.stages(1_000_000, 512, 2)
    assert [stage.kind for stage in stages] == [leg.kind for leg in method.legs]
    assert abs(sum(stage.tokens for stage in stages) - 1_000_000) < 0.01 * 1_000_000
    with pytest.raises(RegraftError, match=f"leave stage '{method.legs[0].kind}'.*give .* or more"):
        method.stages(64, 1024)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_goes_from_end_to_end(name: str, folder: Path, tmp_path: Path, capsys) -> None:
    out, way = tmp_path / "out", methods.find_method(name)
    told = as_json(capsys, *words(folder, name, out))
    made = Checkpoint.open(out)
    assert told["method"] == name and made.config["model_type"] == "regraft"
    assert [step["step"] for step in made.history] == ["Remix", "Train"]
    assert told["ledger"]["tokens"] == sum(stage.tokens for stage in way.stages(1024, 64))
    before = [row["kind"].split()[0] for row in told["ledger"]["start"]]
    measured, begun = ":" in way.remix.keep and "every" not in way.remix.keep, bool(way.calibration)
    assert before == ["layers:"] * measured + ["closed"] * begun
    assert all(
        row["flops"] > 0 and row["seconds"] > 0 and row["tokens"] > 0
        for row in told["ledger"]["start"]
    )
    assert {file.name for file in out.iterdir()} >= {
        "metrics.jsonl",
        "lineage.json",
        "tokenizer.json",
    }
    assert not (out / WORK).exists()
    assert as_json(capsys, *words(folder, name, out))["ledger"] == told["ledger"]
    again = words(folder, name, out, "--seed", 7)
    assert "finished linearized training with another" in refused(capsys, *again)


def test_a_killed_conversion_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    as_json(capsys, *words(folder, "auto", tmp_path / "whole", "--keep", "restore:1"))
    write, rows = loop.write_metrics_row, []

    def dying(run: loop.Run, row: dict) -> None:
        write(run, row)
        rows.append(row)
        if len(rows) == 9:
            raise KeyboardInterrupt

    train = loop.train
    monkeypatch.setattr(loop, "write_metrics_row", dying)
    monkeypatch.setattr(
        loop, "train", lambda run: train(dataclasses.replace(run, save_seconds=0.0))
    )
    with pytest.raises(AssertionError, match="130"):
        as_json(capsys, *words(folder, "auto", tmp_path / "cut", "--keep", "restore:1"))
    monkeypatch.undo()
    said = refused(capsys, *words(folder, "auto", tmp_path / "cut", "--keep", "none"))
    assert "linearized training with another method" in said
    as_json(capsys, *words(folder, "auto", tmp_path / "cut", "--keep", "restore:1"))
    one, two = (Checkpoint.open(tmp_path / name) for name in ("whole", "cut"))
    assert all(
        torch.equal(lazy.read(), two.tensors[key].read()) for key, lazy in one.tensors.items()
    )


def test_flags_change_a_method_and_a_mixers_options_go_with_it() -> None:
    supra = methods.find_method("supra")
    assert supra.with_remix(keep="every:2").remix.options == supra.remix.options
    other = supra.with_remix(mixer="gated_deltanet", window=32).remix
    assert (other.mixer, other.options, other.window, other.keep) == (
        "gated_deltanet",
        {},
        32,
        "none",
    )


def test_auto_measures_layers_where_there_is_text_and_says_so_where_not(
    folder: Path, tmp_path: Path, capsys
) -> None:
    model, data = folder / "model", ["--data", folder / "text.txt"]
    plans = [
        as_json(capsys, "plan", model, "--method", "auto"),
        as_json(capsys, "linearize", model, tmp_path / "untold", "--json"),
        as_json(capsys, "linearize", model, tmp_path / "told", *data, "--json"),
        as_json(capsys, "linearize", model, tmp_path / "asked", "--keep", "1", "--json"),
    ]
    (tmp_path / "short.txt").write_text("not a row")
    said = refused(capsys, "linearize", model, tmp_path / "short", "--data", tmp_path / "short.txt")
    assert "less than one row of" in said and "--keep every:4 measures nothing" in said
    notes = [bool([note for note in plan["notes"] if "recall:25%" in note]) for plan in plans]
    assert notes == [True, True, False, False]
    assert [len(plan["layers"]["softmax"]) for plan in plans] == [1, 1, 1, 1]
    assert plans[0]["layers"]["softmax"] == plans[1]["layers"]["softmax"] == [0]
    remix = remix_of(Checkpoint.open(tmp_path / "told"))
    assert remix.scores["rule"] == "recall" and plans[2]["layers"]["softmax"] == [int(remix.keep)]


def test_a_recipe_may_name_a_method(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"source": "m", "train": [], "method": "taylor", "tokens": 65536})
    )
    recipe = schema.load(str(file), {"stages.0.tokens": "2048", "remix": "{keep: none}"})
    assert recipe.remix.keep == "none" and recipe.remix.window == 0 and recipe.calibration == 8192
    assert [stage.kind for stage in recipe.stages] == ["align", "distil"] and recipe.stages[
        0
    ].tokens == 2048
    with pytest.raises(RegraftError, match="needs tokens"):
        schema.build(expand_method({"source": "m", "train": [], "method": "auto"}))


def test_wrong_use(folder: Path, tmp_path: Path, capsys) -> None:
    assert "did you mean supra?" in refused(
        capsys, "linearize", folder / "model", tmp_path / "o", "--method", "supr"
    )
    assert "give --data" in refused(
        capsys, "linearize", folder / "model", tmp_path / "o", "--tokens", 100
    )
    assert "is the source" in refused(
        capsys, *words(folder, "auto", folder / "model", "--overwrite")
    )
    assert (folder / "model" / "model.safetensors").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    assert "is not of regraft" in refused(capsys, *words(folder, "auto", tmp_path / "full"))
    assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("repeats", [1, 30])
def test_text_that_a_window_shows_whole_is_told(
    repeats: int, folder: Path, tmp_path: Path, capsys
) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "a few words " * repeats})] * 200
    text.write_text("\n".join(lines))
    line = ["linearize", folder / "model", tmp_path / "out", "--data", text, "--keep", "0"]
    line += ["--window", 16, "--tokens", 256, "--length", 64]
    code, _, err = run_main(capsys, *line)
    assert code == 0
    assert ("only 0% of the training tokens have text before" in err) == (repeats == 1)


def test_rows_must_leave_the_window(folder: Path, tmp_path: Path, capsys) -> None:
    line = words(folder, "auto", tmp_path / "out")
    assert "never leave the window of 64" in refused(capsys, *line, "--window", 64)
    assert not (tmp_path / "out").exists()
    rows = [Stage("align", tokens=64, length=64)]
    source = Checkpoint.open(folder / "model")
    check_row_lengths(source, rows, RemixOptions(window=63))
    check_row_lengths(source, rows, RemixOptions("window", window=64))
    with pytest.raises(RegraftError, match="give --length 256"):
        check_row_lengths(source, rows, RemixOptions(window=64))


def test_dropping_windows_needs_windows(folder: Path, tmp_path: Path) -> None:
    _, model = tiny("llama")
    stage = loop.Stage("next", tokens=64, length=32, window_drop=0.5)
    with pytest.raises(RegraftError, match="no layer has one"):
        loop.check_run(loop.Run(model, [stage], lambda length: None, tmp_path), stage)
    with pytest.raises(RegraftError, match="ce is for distil"):
        loop.Stage("next", tokens=64, length=32, ce=0.5)
