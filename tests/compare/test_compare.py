"""`regraft compare`: savings from known curves, recipes, a tiny comparison end to end, killed and
gone on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.comparison import RECIPES, TINY, recipe
from helpers.html import Balanced

from regraft.cli import main as cli
from regraft.compare import arm as arms
from regraft.compare import data, report, savings, scheduler
from regraft.compare import recipe as schema
from regraft.compare.folders import FITTING
from regraft.compare.numbers import NO_COST
from regraft.compare.savings import Curve, compute_savings, find_crossing, mean_and_std, mean_curve
from regraft.core.checkpoint import Checkpoint
from regraft.data.images import read_images
from regraft.errors import RegraftError
from regraft.growth.steps.transplant import Transplant
from regraft.train import fit_ligo


def line(flops: list[float], loss: list[float]) -> Curve:
    return Curve(flops, flops, [f / 10 for f in flops], loss, [0.0] * len(flops))


def test_crossing_is_the_first_and_linear():
    totals, losses = [0.0, 10.0, 20.0, 30.0], [4.0, 2.0, 3.0, 1.0]
    assert find_crossing(totals, losses, 3.0) == 5.0
    assert find_crossing(totals, losses, 1.5) == 27.5
    assert find_crossing(totals, losses, 5.0) == 0.0
    assert find_crossing(totals, losses, 0.9) is None


def test_savings_of_known_curves():
    scratch = line([0, 50, 100], [5.0, 3.0, 2.0])
    grown = line(
        [10, 60, 110], [4.0, 2.5, 1.5]
    )  # a fitting of 10 is in its own totals; 2.0 is half-way from 60 to 110
    found = compute_savings(grown, scratch, {"flops": 20.0, "seconds": 3.0, "tokens": 0.0})
    assert (
        found["flops_to_reach"] == 85
        and found["saved_flops"] == 15
        and found["saved_flops_share"] == 0.15
    )
    assert found["saved_flops_share_with_source"] == pytest.approx(-0.05)
    assert found["times_flops"] == pytest.approx(100 / 85)
    assert found["saved_seconds"] == pytest.approx(1.5) and found[
        "saved_seconds_with_source"
    ] == pytest.approx(-1.5)


def test_what_is_never_reached_is_no_saving():
    scratch = line([0, 100], [5.0, 2.0])
    found = compute_savings(line([0, 100], [4.0, 2.1]), scratch, NO_COST)
    assert set(found.values()) == {None}
    dipped = line([0, 50, 100], [5.0, 1.0, 2.0])
    assert compute_savings(dipped, dipped, NO_COST)["saved_flops"] == 0
    arm = {
        "savings": found,
        "savings_over_seeds": {k: mean_and_std([v, 0.5]) for k, v in found.items()},
        "seeds": {0: 0, 1: 0},
    }
    assert (
        report.format_saving(arm, "saved_flops_share", 100, "%") == "not reached (1 of 2 seeds do)"
    )


def test_means_and_spreads():
    mean = mean_curve([line([0, 10], [4.0, 2.0]), line([0, 20], [2.0, 1.0])])
    assert mean.flops == [0, 15] and mean.loss == [3.0, 1.5]
    assert mean_and_std([1.0, None, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "count": 2}
    assert mean_and_std([None]) == {"mean": None, "std": None, "count": 0}


def test_stages_of_one_run_are_one_curve(tmp_path):
    rows = [(0, 0, 0, 5.0), (0, 5, 50, 4.0), (1, 0, 0, 4.0), (1, 5, 70, 3.0)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage, step, flops, loss in rows:
            row = {"stage": stage, "kind": "next", "step": step, "tokens": step}
            row |= {"flops": flops, "seconds": flops}
            file.write(json.dumps(row | {"eval_loss": loss, "eval_accuracy": 0.1}) + "\n")
            file.write(json.dumps(row | {"kind": "next", "loss": 1.0}) + "\n")
    stages = [{"tokens": 5, "flops": 50, "seconds": 50}, {"tokens": 5, "flops": 70, "seconds": 70}]
    start = {"tokens": 0, "flops": 7, "seconds": 1.0}
    curve = savings.read_curve(tmp_path, {"ledger": {"stages": stages}, "start": start})
    assert curve.flops == [7, 57, 127] and curve.loss == [5.0, 4.0, 3.0]


def test_a_sub_model_is_not_the_arm(tmp_path):
    rows = [(0, 0, 9.0), (0, 5, 1.0), (1, 0, 4.0), (1, 5, 3.0)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage, step, loss in rows:
            row = {
                "stage": stage,
                "step": step,
                "tokens": step,
                "flops": 10 * step,
                "seconds": step,
            }
            file.write(json.dumps(row | {"eval_loss": loss, "eval_accuracy": 0.1}) + "\n")
    entry = {"tokens": 5, "flops": 50, "seconds": 5}
    facts = {"arm": {"legs": [{"layers": "bottom:1"}]}, "ledger": {"stages": [entry, entry]}}
    curve = savings.read_curve(tmp_path, facts | {"whole": {"loss": 6.0, "accuracy": 0.0}})
    assert curve.loss == [6.0, 4.0, 3.0] and curve.flops == [0, 50, 100]


@pytest.mark.parametrize("name", ["decoder", "encoder", "digits"])
def test_shipped_comparisons_are_valid(name):
    made = schema.load(str(RECIPES / f"compare_{name}.yaml"), {"seeds": "[7]", "train.lr": "0.1"})
    assert made.seeds == [7] and made.train.lr == 0.1 and len(made.arms) > 10
    for arm in made.arms:
        stages = made.stages(arm)
        assert sum(stage.steps for stage in stages) == made.stage(made.train).steps
        assert all(stage.kind == made.task for stage in stages)


BAD = [
    ({"arms": [{"name": "a", "grow": {}}]}, "no scratch arm"),
    ({"arms": [{"name": "scratch", "scratch": True, "hwo": "pad"}]}, "hwo"),
    ({"arms": [*TINY["arms"], {"name": "x", "grow": {"depth_hwo": "stack"}}]}, "depth_hwo"),
    ({"arms": [*TINY["arms"], {"name": "x"}]}, "no kind"),
    ({"arms": [*TINY["arms"], {"name": "x", "random": True, "grow": {}}]}, "random"),
    ({"arms": [*TINY["arms"], {"name": "a/b", "random": True}]}, "a/b"),
    ({"arms": [*TINY["arms"], {"name": "pad", "random": True}]}, "repeat"),
    ({"arms": [*TINY["arms"], {"name": "x", "random": True, "source": "big"}]}, "source 'big'"),
    ({"arms": [*TINY["arms"], {"name": "x", "random": True, "moments": True}]}, "moments"),
    ({"arms": [*TINY["arms"], {"name": "x", "random": True, "legs": [{"layers": "bottom:1", "share": 1.0}]}]}, "legs"),
    ({"seeds": []}, "seeds"),
    ({"tsak": "next"}, "task"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_recipes_that_make_no_sense_are_refused(tmp_path, changes, words):
    with pytest.raises(RegraftError, match=words):
        schema.load(recipe(tmp_path, **changes), {})


NOT = [
    ({"target": {"hidden": 8}}, "never shrinks"),
    ({"target": {"layers": 0}}, "never shrinks|positive"),
    ({"arms": [*TINY["arms"], {"name": "x", "grow": {"width_init": "tile"}}]}, "hidden"),
    ({"task": "mask", "vocabulary": 300}, "does not do task 'mask'"),
    ({"task": "image"}, "npz"),
    ({"data": "nowhere.npz"}, "nowhere.npz"),
    ({"vocabulary": 100}, "vocabulary 100"),
    ({"source": {"hidden_size": 8}}, "model_type"),
    ({"others": {"b": {"num_attention_heads": 4}}, "arms": [*TINY["arms"], {"name": "x", "source": "b", "grow": {}}]},
     "heads"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), NOT, ids=[words for _, words in NOT])
def test_what_cannot_be_compared_is_said_before_training(tmp_path, text, changes, words):
    made = schema.load(recipe(tmp_path, **{"data": str(text), **changes}), {})
    with pytest.raises(RegraftError, match=words):
        scheduler.run(made, tmp_path / "out")
    assert not (tmp_path / "out" / "sources").exists()


def test_images_of_an_archive_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", pixel_values=np.zeros((4, 1, 8, 8)))
    made = schema.load(recipe(tmp_path, task="image", data=str(tmp_path / "x.npz")), {})
    with pytest.raises(RegraftError, match="labels"):
        scheduler.run(made, tmp_path / "out")


def test_digits_are_handwriting_or_a_clear_line(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(RegraftError, match=r"pip install 'regraft\[compare\]'"):
            data.load_digit_images()
    pytest.importorskip("sklearn")
    pixels, labels = data.load_digit_images()
    assert (
        pixels.shape == (1797, 1, 8, 8)
        and sorted(set(labels)) == list(range(10))
        and abs(pixels.mean()) < 1e-5
    )


def test_digits_to_train_on_are_moved_and_those_held_out_are_not(tmp_path, monkeypatch):
    pixels = np.arange(10 * 16, dtype=np.float32).reshape(10, 1, 4, 4)
    monkeypatch.setattr(data, "load_digit_images", lambda: (pixels, np.arange(10)))
    made = schema.load(str(RECIPES / "compare_digits.yaml"), {})
    data.write_images(made, tmp_path)
    train, held = (read_images(tmp_path / f"{name}.npz") for name in ("train", "heldout"))
    assert len(train) == 9 * 8 and len(held) == 2
    assert all(
        (held.pixel_values[i] == torch.from_numpy(pixels[held.labels[i]])).all() for i in range(2)
    )
    first = train[: 8 * 9 : 8]  # one image and where it went
    assert set(first.labels.tolist()) == {int(first.labels[0])}
    old, right, down = (first.pixel_values[at, 0] for at in (4, 3, 1))
    assert (old == torch.from_numpy(pixels[first.labels[0], 0])).all()
    assert (right[:, 1:] == old[:, :-1]).all() and (right[:, 0] == old[:, 0]).all()
    assert (down[1:] == old[:-1]).all() and (down[0] == old[0]).all()


PYTHON = sys.executable  # the real one, whose children have it as their parent


def command(python: str, place: str, out: Path, *more: str) -> list[str]:
    return [python, "-m", "regraft", "compare", place, str(out), "--json", *more]


def losses(numbers: dict) -> dict:
    return {
        (name, seed): one["curve"]["loss"] + one["curve"]["flops"]
        for name, arm in numbers["arms"].items()
        for seed, one in arm["seeds"].items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_a_comparison_end_to_end_killed_and_resumed(tmp_path, text, capsys):
    place = recipe(tmp_path, data=str(text))
    one = ("--seeds", "[1]")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main(["compare", place, str(whole), "--jobs", "2", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    words, nowhere = command(PYTHON, place, broken, *one), subprocess.DEVNULL
    process = subprocess.Popen(words, stdout=nowhere, stderr=nowhere)
    deadline = time.monotonic() + 600
    while not list(broken.glob("arms/*/*/done.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in broken.glob("*/*/*/done.json")}
    assert 0 < len(before) < 3
    words[0] = sys.executable
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert len(losses(numbers)) == 4 and len(losses(again)) == 2
    assert losses(again).items() <= losses(numbers).items()
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    scratch = numbers["arms"]["scratch"]
    assert (
        scratch["loss"]["mean"] < scratch["start_loss"]["mean"]
        and scratch["savings"]["saved_flops"] == 0
    )
    assert (
        len(scratch["curve"]["loss"]) == 3
        and numbers["sources"]["source"]["seeds"]["0"]["flops"] > 0
    )
    page = (whole / "compare.html").read_text()
    Balanced().feed(page)
    assert page.count("data:image/svg+xml") == 3
    assert (whole / "table.md").read_text().startswith("| arm |")


def test_a_killed_arm_goes_on_with_its_fitting(tmp_path, text, monkeypatch):
    learned = {"name": "learned", "ligo": {"steps": 4}}
    made = schema.load(
        recipe(tmp_path, data=str(text), arms=[*TINY["arms"], learned], seeds=[0]), {}
    )
    seen: list[int] = []
    fit = fit_ligo.fit_maps

    def noted(*words, progress, **more):
        def note(step, steps, row):
            seen.append(step)
            progress(step, steps, row)

        return fit(*words, progress=note, save_seconds=0.0, **more)

    def killed(share):
        if len(seen) == 3:
            raise InterruptedError("killed")

    monkeypatch.setattr(fit_ligo, "fit_maps", noted)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        data.prepare_data(made, tmp_path / name)
        arms.pretrain(made, tmp_path / name, "source", 0, lambda share: None)
    with pytest.raises(InterruptedError):
        arms.train_arm(made, tmp_path / "broken", "learned", 0, killed)
    for name in ("broken", "whole"):
        arms.train_arm(made, tmp_path / name, "learned", 0, lambda share: None)
    assert seen == [1, 2, 3, 3, 4, 1, 2, 3, 4]
    curves = [
        savings.load_finished_runs(tmp_path / name, "learned", [0])[0][1]
        for name in ("whole", "broken")
    ]
    assert curves[0].loss == curves[1].loss and curves[0].flops == curves[1].flops
    assert not (arms.arm_folder(tmp_path / "broken", "learned", 0) / FITTING).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_a_failed_arm_does_not_stop_the_others(tmp_path, text, capsys):
    arms = [*TINY["arms"], {"name": "wild", "grow": {"width_init": "pad"}, "lr": 1e30}]
    out = tmp_path / "out"
    place = recipe(tmp_path, data=str(text), arms=arms, seeds=[0])
    assert cli.main(["compare", place, str(out), "--jobs=2"]) == 1
    found = capsys.readouterr()
    assert (
        "FAILED: arm wild, seed 0: loss" in " ".join(found.out.split())
        and "Traceback" not in found.err
    )
    assert set(json.loads((out / "compare.json").read_text())["arms"]) == {"scratch", "pad"}
    with pytest.raises(RegraftError, match="another train"):
        scheduler.run(schema.load(place, {"train.lr": "0.5"}), out)
    with pytest.raises(RegraftError, match="holds another arm 'pad'"):
        scheduler.run(schema.load(place, {"arms.1.warmup": "0.5"}), out)


def test_transplant_keeps_the_old_corner(tmp_path):
    from helpers.tiny import tiny

    tiny("gpt_neox")[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    old = source.sizes
    sizes = {
        "hidden": 2 * old["hidden"],
        "ffn": old["ffn"] + 8,
        "heads": 2 * old["kv"] * old["group"],
    }
    made = Transplant(**sizes, layers=source.layers + 1)(source)
    for role in ("attn.q.weight", "mlp.up.weight"):
        new, before = made[role, 0].read(), source[role, 0].read()
        assert (new[: before.shape[0], : before.shape[1]] == before).all()
        assert (new[before.shape[0] :] != 0).any() and (made[role, source.layers].read() != 0).all()
    with pytest.raises(RegraftError, match="never shrinks"):
        Transplant(layers=1)(source)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("regraft: no text\nTraceback\nRuntimeError: later", "no text"),
        (
            (
                "[rank1]: RuntimeError: closed by peer\nraise"
                " ChildFailedError(\nx.errors.ChildFailedError: \n====="
            ),
            "closed by",
        ),
        (
            (
                "x.errors.ChildFailedError:\n  traceback : Signal 11 (SIGSEGV) received by PID"
                " 7\n====="
            ),
            "Signal 11",
        ),
        ("what else", "what else"),
        ("", "without a message"),
    ],
)
def test_a_run_that_failed_is_told_by_what_ended_it(log: str, said: str, tmp_path: Path) -> None:
    task = scheduler.TrainingJob("arm", "a", 0)
    task.log_path(tmp_path).parent.mkdir()
    task.log_path(tmp_path).write_text(log)
    assert said in task.read_error(tmp_path) and "regraft:" not in task.read_error(tmp_path)
