"""Frozen training and the loss-improvement threshold: published curves, the loop that obeys it,
resumption.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.tiny import SPECIAL, byte_tokenizer, tiny, write_text
from helpers.training import Killed, text_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.train import loop
from regraft.train.lit import Lit, LitState
from regraft.train.optimizer import parameter_origins
from regraft.train.stage import Stage

# r_k of XATL's 410M RetNet runs at 10k, 15k, ... steps, read off the authors' plots, and where they
# unfroze.
PUBLISHED = {
    "skip_reten": ([0.22, 0.026, 0.0077, 0.0056, 0.0009, 0.0046, 0.0063, -0.0025, 0.0036], 20),
    "skip_oproj": ([0.172, 0.025, 0.0087, 0.0066, 0.0019, 0.0053, 0.0066, -0.0026, 0.0037], 20),
    "skip_mlp": ([0.23, 0.048, 0.022, 0.015, 0.008, 0.0003, 0.007, 0.004, 0.003], 30),
}


def curve(improvements: list[float], window: int) -> list[float]:
    """Losses whose windows improve as given, the first of them by nothing to compare with."""
    means = [4.0]
    for share in improvements:
        means.append(means[-1] * (1 - share))
    return [mean + 0.1 * (step - (window - 1) / 2) for mean in means for step in range(window)]


def unfrozen(losses: list[float], lit: Lit) -> int | None:
    watch = LitState()
    said = [watch.observe(loss, lit) for loss in losses]
    assert [at for at, yes in enumerate(said, 1) if yes] == (
        [] if watch.unfrozen is None else [watch.unfrozen]
    )
    return watch.unfrozen


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_curves_unfreeze_where_the_authors_did(name: str) -> None:
    improvements, thousands = PUBLISHED[name]
    losses = curve(improvements, 5)
    assert unfrozen(losses, Lit(window=5)) == thousands
    assert unfrozen(losses, Lit(window=5, tau=0.005, patience=9)) is None


def test_patience_counts_all_hits_between_the_least_and_the_most_steps() -> None:
    losses = curve([0.3, 0.001, 0.2, 0.001, 0.001], 4)
    assert unfrozen(losses, Lit(window=4)) == 12
    assert unfrozen(losses, Lit(window=4, patience=2)) == 20
    assert unfrozen(losses, Lit(window=4, min_steps=13)) == 20
    assert unfrozen(losses, Lit(window=4, patience=9, max_steps=7)) == 7
    assert unfrozen(losses, Lit(window=4, patience=9)) is None
    assert (
        unfrozen([0.0] * 8, Lit(window=4, tau=0.01)) is None
    )  # nothing to divide by: no improvement is asked for


@given(
    losses=st.lists(st.floats(0.1, 9.0), max_size=60),
    cut=st.integers(0, 60),
    patience=st.integers(1, 3),
)
def test_a_watch_goes_on_from_its_fields(losses: list[float], cut: int, patience: int) -> None:
    lit, watch = Lit(window=3, patience=patience), LitState()
    for at, loss in enumerate(losses):
        if at == cut:
            watch = LitState(**json.loads(json.dumps(dataclasses.asdict(watch))))
        watch.observe(loss, lit)
    assert watch.unfrozen == unfrozen(losses, lit)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"patience": 0}, {"warmup": 0}, {"max_steps": 3, "min_steps": 4}]
)
def test_thresholds_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RegraftError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        Lit(**wrong)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    tiny("gpt_neox", layers=2)[1].save_pretrained(folder)
    return Checkpoint.open(folder)


REMIX = Remix("supra", "0", window=0, inherit="o")
LIT = Lit(window=3, tau=2.0, max_steps=9, warmup=4)  # any second window is a hit: after step 6
STAGE = Stage(
    "next",
    14 * 32,
    length=32,
    learn="lit",
    lit=LIT,
    lr_body=1e-2,
    lr_mixer=1e-2,
    lr_new=1e-2,
    precision="float32",
)


def go(
    source: Checkpoint, stage: Stage, out: Path, stop_after: int | None = None
) -> tuple[list[dict], nn.Module]:
    def progress(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        if step == stop_after:
            raise Killed

    model = modeling.materialize(REMIX(source))
    made = loop.train(
        loop.Run(model, [stage], lambda length: text_rows(), out, progress=progress, save_seconds=0)
    )
    assert made["stages"][0].get("unfrozen") == (6 if stage.learn == "lit" else None)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in values(model).items() if not torch.equal(value, before[name])}


def test_what_was_copied_is_frozen_and_nothing_else(source: Checkpoint, tmp_path: Path) -> None:
    before = values(modeling.materialize(REMIX(source)))
    _, model = go(source, dataclasses.replace(STAGE, learn="new"), tmp_path / "new")
    new = {
        id(p)
        for p in model.parameters()
        if parameter_origins(model).get(id(p), ("", 0))[0] == "new"
    }
    assert changed(model, before) == {name for name, p in model.named_parameters() if id(p) in new}
    names = changed(model, before)
    assert any("mixer.q_proj" in name for name in names) and not any(
        ".o_proj." in name or "mlp" in name for name in names
    )
    rows, model = go(source, STAGE, tmp_path / "lit")
    assert changed(model, before) == set(before)
    assert (
        [row["step"] for row in rows if "unfrozen" in row]
        == [6]
        == [row["unfrozen"] for row in rows[5:6]]
    )
    backward = [row["flops"] - last["flops"] for last, row in zip(rows, rows[1:], strict=False)]
    assert (
        backward[0] == backward[4] < backward[5] == backward[-1]
    )  # frozen weights have no gradient to compute


def test_frozen_weights_wait_and_then_warm_up() -> None:
    stage = dataclasses.replace(STAGE, cooldown=0.0, warmup=0.0)
    assert [stage.lr_factor(step, since=6) for step in range(6, 12)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]
    sloped = dataclasses.replace(stage, cooldown=1.0)
    assert [sloped.lr_factor(step, since=6) for step in (6, 9)] == [
        sloped.lr_factor(9) / 4,
        sloped.lr_factor(9),
    ]
    assert sloped.lr_factor(10, since=6) == sloped.lr_factor(10)
    assert (
        0 < sloped.lr_factor(13, since=12) == sloped.lr_factor(13)
    )  # less time is left than the warm-up takes


@pytest.mark.parametrize("cut", [2, 5, 6, 7, 11])
def test_resumed_losses_equal_uninterrupted(source: Checkpoint, tmp_path: Path, cut: int) -> None:
    whole, model = go(source, STAGE, tmp_path / "whole")
    with pytest.raises(Killed):
        go(source, STAGE, tmp_path / "cut", cut)
    resumed, again = go(source, STAGE, tmp_path / "cut")
    keys = ("step", "loss", "grad_norm", "lr", "flops", "unfrozen")
    assert [[row.get(key) for key in keys] for row in resumed] == [
        [row.get(key) for key in keys] for row in whole
    ]
    assert not changed(again, values(model))


def test_models_without_mixers_have_nothing_new(tmp_path: Path) -> None:
    model = tiny("gpt_neox", layers=2)[1]
    with pytest.raises(RegraftError, match="learn 'lit' is for models with mixers"):
        loop.train(loop.Run(model, [STAGE], lambda length: text_rows(), tmp_path))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("gpt_neox", layers=2, vocab=len(SPECIAL) + 256)[1]
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    write_text(tmp_path / "text.txt")
    command = [
        "linearize",
        tmp_path / "source",
        tmp_path / "linear",
        "--mixer",
        "retnet",
        "--window",
        0,
    ]
    made = as_json(capsys, *command, "--keep", "none", "--inherit", "o")
    assert made["steps"][-1]["arguments"]["inherit"] == "o"
    train = [
        "train",
        tmp_path / "linear",
        tmp_path / "out",
        "--data",
        tmp_path / "text.txt",
        "--stage",
        "next",
    ]
    train += ["--tokens", 128, "--length", 32, "--learn", "lit", "--stage-options"]
    assert "widow" in refused(capsys, *train, '{"lit": {"widow": 2}}')
    assert (
        as_json(capsys, *train, '{"lit": {"window": 2, "max_steps": 2}}')["stages"][0]["unfrozen"]
        == 2
    )
