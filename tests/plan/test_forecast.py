"""Forecasts of training: the memory model against what real tensors take, sharding, what fits, and
what to change.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused, run_main
from helpers.tiny import tiny

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.io.units import parse_number
from regraft.mixers.remix import Remix
from regraft.modeling import flops
from regraft.plan import forecast
from regraft.plan import step_memory as simulation
from regraft.plan.fake_tensors import LiveMemoryCounter
from regraft.plan.forecast import plan_step_memory
from regraft.plan.gpu_memory import largest_micro_batch, memory_by_moment, peak_memory
from regraft.plan.training_request import TrainingForecastRequest
from regraft.train import distill, objectives, optimizer
from regraft.train.align import align_step
from regraft.train.gradient_checkpointing import set_gradient_checkpointing
from regraft.train.stage import Stage

LENGTH = 96
LINEAR = Remix("gated_deltanet", "0", window=16, sinks=2)


def saved(folder: Path, family: str, **keys: Any) -> Checkpoint:
    tiny(family, hidden=64, heads=8, kv=4, dim=8, ffn=160, layers=4, vocab=601, **keys)[
        1
    ].save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("source"), "llama")


def text(rows: int) -> Packed:
    """Two documents in every row."""
    ids = torch.randint(3, 601, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.arange(LENGTH).remainder(LENGTH // 2).expand_as(ids)
    return Packed(ids, places, torch.full((rows,), LENGTH))


def taken(
    source: Checkpoint, target: Checkpoint, asked: TrainingForecastRequest, rows: int
) -> float:
    """Bytes alive at the worst moment of a real step, beside the weights."""
    fast, given = asked.precision == "bfloat16", text(rows)
    model, teacher = modeling.materialize(target), modeling.materialize(source)
    teacher.requires_grad_(False)
    optimizer.parameter_groups(model, Stage(asked.stage, LENGTH, LENGTH))
    set_gradient_checkpointing(model, asked.checkpointing)
    known = [tensor for one in (model, teacher) for tensor in (*one.parameters(), *one.buffers())]
    with LiveMemoryCounter(known) as alive:
        if asked.stage == "next":
            seen, labels = objectives.build_targets(model, "next", given)
            objectives.compute_loss_on_targets(model, "next", seen, labels, fast).backward()
        elif asked.stage == "distil":
            distill.distil_step(model, teacher, given, fast)
        else:
            align_step(model, teacher, modeling.slots(teacher, source), given, fast)
    return alive.peak


CASES = [
    ("llama", "next", {"precision": "bfloat16"}, True),
    ("llama", "next", {"checkpointing": True, "precision": "bfloat16"}, False),
    ("qwen2", "distil", {}, True),
    ("gpt2", "next", {"checkpointing": True}, True),
    ("gpt_neox", "next", {}, False),
    ("gemma2", "next", {}, True),
    ("mixtral", "next", {}, False),
]


@pytest.mark.parametrize("family, kind, flags, tied", CASES)
def test_the_memory_model_is_that_of_real_tensors(
    family: str, kind: Any, flags: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    made = saved(tmp_path, family, tie_word_embeddings=tied)
    asked = TrainingForecastRequest(stage=kind, length=LENGTH, **({"precision": "float32"} | flags))
    step = plan_step_memory(made, made if kind == "distil" else None, asked)
    assert (
        step.weight_count
        == step.trainable_count
        == sum(lazy.size for lazy in made.tensors.values())
    )
    for rows in (1, 5):
        used = peak_memory(step, asked, rows, False)
        told = sum(used.values()) - used["parameters"] - used["adam"] - used["teacher"]
        assert 0.9 < told / taken(made, made, asked, rows) < 1.15


@pytest.mark.parametrize("kind, precision", [("distil", "bfloat16"), ("align", "float32")])
def test_the_memory_model_holds_for_mixers(source: Checkpoint, kind: Any, precision: Any) -> None:
    target = LINEAR(source)
    asked = TrainingForecastRequest(stage=kind, length=LENGTH, precision=precision)
    step = plan_step_memory(target, source if kind != "next" else None, asked)
    assert (step.trainable_count < step.weight_count) == (kind == "align")
    used = peak_memory(step, asked, 3, False)
    told = sum(used.values()) - used["parameters"] - used["adam"] - used["teacher"]
    assert 0.85 < told / taken(source, target, asked, 3) < 1.25


def test_counting_flops_keeps_nothing_that_checkpointing_frees(source: Checkpoint) -> None:
    model, given = modeling.materialize(source), text(4)
    set_gradient_checkpointing(model, True)
    seen, labels = objectives.build_targets(model, "next", given)
    peaks = []
    for counting in (nullcontext(), flops.build_flop_counter()):
        with LiveMemoryCounter([*model.parameters(), *model.buffers()]) as alive, counting:
            objectives.compute_loss_on_targets(model, "next", seen, labels).backward()
        peaks.append(alive.peak)
        model.zero_grad(set_to_none=True)
    assert (
        peaks[1] < 1.3 * peaks[0]
    )  # 2.5 with the record of modules; what it takes apart has temporaries of its own


def test_short_rows_tell_what_linear_mixers_take_on_long_ones(
    source: Checkpoint, monkeypatch: Any
) -> None:
    asked = TrainingForecastRequest(stage="distil", length=256, precision="float32")
    whole = plan_step_memory(LINEAR(source), source, asked)
    monkeypatch.setattr(simulation, "SHORT_LENGTH", 128)
    short = plan_step_memory(LINEAR(source), source, asked)
    for one, other in zip(whole.layers, short.layers, strict=True):
        assert other.kept(4) == pytest.approx(one.kept(4), rel=0.05)
        assert other.working(4) == pytest.approx(one.working(4), rel=0.15)


def test_sharding_divides_what_stays_and_gathers_what_runs(source: Checkpoint) -> None:
    asked = TrainingForecastRequest(stage="distil", length=LENGTH)
    step = plan_step_memory(source, source, asked)
    one, four = (peak_memory(step, replace(asked, gpus=gpus), 1, False) for gpus in (1, 4))
    for name in ("parameters", "adam", "teacher"):
        assert four[name] == one[name] / 4
    assert one["gathered"] == 0 < four["gathered"]
    assert one["parameters"] == 4 * step.weight_count and one["adam"] == 8 * step.weight_count
    summed = peak_memory(step, replace(asked, gpus=4), 1, True)
    assert summed["gradients"] >= step.weight_count  # 4 bytes each, over 4 GPUs


def test_the_largest_micro_batch_is_the_largest_that_fits(source: Checkpoint) -> None:
    asked = TrainingForecastRequest(
        stage="next", length=LENGTH, memory="300MB", tokens="1M", price=2.0, gpus=2, batch=64
    )
    step = plan_step_memory(source, None, asked)
    room = int(asked.memory_bytes * (1 - forecast.RESERVE))
    most = largest_micro_batch(step, asked, room)
    assert sum(peak_memory(step, asked, most, most < 32).values()) <= room
    assert sum(peak_memory(step, asked, most + 1, most + 1 < 32).values()) > room
    facts = forecast.forecast(source, source, asked)
    assert (
        facts["largest_micro_batch"] == most
        and facts["micro_batch"] * facts["accumulation"] * 2 == 64
    )
    assert facts["used_bytes"] <= room and len(list(memory_by_moment(step, asked, 1, False))) == 5
    per = flops.training_flops(source, LENGTH) / LENGTH
    assert facts["tokens_per_second"] == pytest.approx(2 * 989e12 * facts["share"] / per)
    assert facts["gpu_hours"] == pytest.approx(1e6 / facts["tokens_per_second"] / 3600 * 2)
    assert facts["cost"] == pytest.approx(2 * facts["gpu_hours"]) and facts["tokens"] == 10**6
    assert facts["days"] * 48 == pytest.approx(facts["gpu_hours"])
    again = forecast.forecast(source, source, replace(asked, checkpointing=True, stage="distil"))
    assert (
        again["teacher_flops_per_token"]
        == again["again_flops_per_token"]
        == flops.forward_flops(source, LENGTH) / LENGTH
    )


@pytest.mark.parametrize("memory", ["5MB", "4MB"])
def test_what_does_not_fit_says_what_would(source: Checkpoint, memory: str) -> None:
    asked = TrainingForecastRequest(stage="next", length=LENGTH, memory=memory)
    with pytest.raises(
        RegraftError, match=r"one row of 96 tokens takes .* of the 0.0 GB"
    ) as refusal:
        forecast.forecast(source, source, asked)
    gpus = re.search(r"give (\d+) GPUs", str(refusal.value))
    again = "--checkpointing" in str(refusal.value)
    assert gpus or again
    advised = replace(asked, gpus=int(gpus[1]) if gpus else 1, checkpointing=again)
    assert forecast.forecast(source, source, advised)["largest_micro_batch"] >= 1
    with pytest.raises(
        RegraftError, match="give shorter rows .--length 48. or GPUs with more memory"
    ):
        forecast.forecast(source, source, replace(asked, memory="100KB"))


def test_numbers_are_read_as_they_are_said() -> None:
    said = {
        "80GB": 80 * 10**9,
        "1.5B": 1_500_000_000,
        "200000": 200_000,
        "64 MB": 64_000_000,
        "2k": 2000,
    }
    assert {text: parse_number(text, "tokens") for text in said} == said
    with pytest.raises(RegraftError, match="memory is 'much'"):
        parse_number("much", "memory")


def test_the_verb_says_it(
    source: Checkpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["plan", source.path, "--mixer", "gated_deltanet", "--window", "16", "--sinks", "2", "--length", LENGTH,
               "--train", "--gpus", "4", "--gpu", "a100", "--tokens", "1B", "--price", "2"]  # fmt: skip
    table = as_json(capsys, *command)["train"]
    assert table["gpus"] == 4 and table["stage"] == "distil" and table["memory_bytes"] == 80 * 10**9
    assert table["peak_flops_per_second"] == 312e12 and table["cost"] > 0
    code, out, _ = run_main(capsys, *command)
    assert code == 0 and "tokens/s, if 35% of the a100's 312 TFLOP/s" in out and "GPU hours" in out
    assert "train" not in as_json(capsys, "plan", source.path)
    tiny("bert")[1].save_pretrained(tmp_path / "bert")
    for words, message in [
        (["--gpu", "abacus"], "no datasheet of 'abacus'"),
        (["--batch", "6"], "batch is 6 rows for 4 GPUs"),
        (["--memory", "1MB"], "give .* GPUs|more memory"),
        (["--share", "1.5"], "share 1.5"),
    ]:
        assert re.search(message, refused(capsys, *command, *words))
    assert "fits mixers" in refused(capsys, "plan", source.path, "--train", "--stage", "align")
    assert "does not predict" in refused(capsys, "plan", tmp_path / "bert", "--train")
