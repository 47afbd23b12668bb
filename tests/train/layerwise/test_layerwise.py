"""Alignment that streams: the mixers of the run that holds the whole model, after a kill and in
parts too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TESTS
from helpers.layerwise import STAGE, rows
from helpers.tiny import tiny

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.train import loop
from regraft.train.calibrate import calibrate
from regraft.train.hooks import LayerRecord, record_layers, run_decoder
from regraft.train.layer_subset import layer_stack
from regraft.train.layerwise import align
from regraft.train.layerwise.one_layer_model import OneLayerModel
from regraft.train.layerwise.state import FOLDER, LayerwiseRun
from regraft.train.stage import Stage

LINEAR = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt2",
    "gemma",
    "phi3",
    "starcoder2",
    "phi",
)
DECODERS = (
    *LINEAR,
    "gemma2",
    "gemma3_text",
    "olmo2",
    "mixtral",
)  # all whose layers can be run one by one


def opened(folder: Path, family: str = "llama", **sizes: Any) -> Checkpoint:
    """A tiny model on disk."""
    tiny(family, **sizes)[1].save_pretrained(folder / family)
    return Checkpoint.open(folder / family)


def joint(
    source: Checkpoint, target: Checkpoint, stage: Stage, out: Path, calibration: int = 0
) -> Any:
    """The model that holds everything, trained by the loop; and its ledger."""
    teacher, model, text = modeling.materialize(source), modeling.materialize(target), rows()
    slots = modeling.slots(teacher, source)
    if calibration:
        list(
            calibrate(model.slots(), teacher, slots, loop.calibration_batches(text, calibration, 0))
        )
    return model, loop.train(loop.Run(model, [stage], lambda length: text, out, teacher, slots))


def mixers(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every mixer's weights by name."""
    found = {
        checkpoint.names[key]: lazy.read()
        for key, lazy in checkpoint.tensors.items()
        if key[0][:5] == "mixer"
    }
    assert found
    return found


def same(trained: Checkpoint, model: Any, start: Checkpoint) -> None:
    """Streamed weights are the joint run's, and both moved."""
    wanted, before = model.state_dict(), mixers(start)
    for name, value in mixers(trained).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(value, before[name]) for name, value in mixers(trained).items()) > 4


@pytest.mark.parametrize("family", DECODERS)
def test_layers_run_one_by_one_as_they_run_together(family: str, tmp_path: Path) -> None:
    source, text = opened(tmp_path, family), rows(4)
    model, teacher = modeling.materialize(source), OneLayerModel(source)
    together: dict[int, LayerRecord] = {}
    last: list[torch.Tensor] = []
    layer_stack(model)[2].register_forward_hook(lambda module, given, output: last.append(output))
    with record_layers(modeling.slots(model, source), [0, 1, 2], together.__setitem__):
        run_decoder(model, text.input_ids, text.position_ids)
    hidden = torch.cat(
        [part for _, part in teacher.embed_batches(text.input_ids, text.position_ids, 3)]
    )
    for layer in range(3):
        with teacher.load_layer(layer, mlp=False):
            alone = teacher.record_attention(hidden, text.position_ids)
        for mine, theirs in (
            (alone.inputs, together[layer].inputs),
            (alone.outputs, together[layer].outputs),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert (alone.rotary is None) == (family == "gpt2")
        for mine, theirs in zip(alone.rotary or (), together[layer].rotary or (), strict=True):
            assert torch.equal(mine, theirs)
        with teacher.load_layer(layer):
            hidden = teacher.run_layer(hidden, text.position_ids)
    torch.testing.assert_close(hidden, last[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", LINEAR)
def test_streamed_mixers_are_those_of_the_joint_run(family: str, tmp_path: Path) -> None:
    source = opened(tmp_path, family)
    target = Remix("gated_deltanet", "1", window=8, sinks=2)(source)
    model, spent = joint(source, target, STAGE, tmp_path / "joint")
    trained, ledger = align.align(
        LayerwiseRun(source, target, STAGE, rows(), tmp_path / "streamed")
    )
    same(trained, model, target)
    assert (
        ledger["tokens"] == spent["tokens"]
        and not ledger["start"]
        and 0.5 < ledger["flops"] / spent["flops"] < 1.5
    )
    trained.save(tmp_path / "out")
    again = modeling.load(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in mixers(trained).items())
    untouched = modeling.materialize(target).state_dict()
    assert all(
        torch.equal(again[name], untouched[name]) for name in set(again) - set(mixers(trained))
    )
    assert (
        json.loads((tmp_path / "out" / "lineage.json").read_text())["steps"][-1]["ledger"]["tokens"]
        == 256
    )


@pytest.mark.parametrize(
    ("remix", "change", "calibration"),
    [
        (Remix("gated_deltanet", "0", window=8, sinks=2), {}, 3),
        (Remix("supra", "none", window=0), {"learn": "new"}, 0),
        (Remix("lightning", "none", window=0), {"kind": "matrix"}, 0),
        (Remix("hedgehog", "2", window=0), {"precision": "bfloat16"}, 0),
    ],
    ids=["calibrated", "new", "matrix", "bfloat16"],
)
def test_every_way_to_align_streams(
    remix: Remix, change: dict, calibration: int, tmp_path: Path
) -> None:
    source, stage = opened(tmp_path), dataclasses.replace(STAGE, **change)
    target = remix(source)
    model, _ = joint(source, target, stage, tmp_path / "joint", calibration)
    run = LayerwiseRun(
        source, target, stage, rows(), tmp_path / "streamed", calibration=calibration
    )
    same(align.align(run)[0], model, target)


class Killed(Exception):
    """A run cut off."""


@pytest.mark.parametrize("scratch", [False, True], ids=["kept", "scratch lost"])
@pytest.mark.parametrize("cut", [1, 4, 6, 8, 11])
def test_a_killed_run_ends_with_the_same_weights(
    cut: int, scratch: bool, tmp_path: Path, monkeypatch
) -> None:
    source = opened(tmp_path, "qwen3", layers=4)
    target, stage = (
        Remix("gated_deltanet", "1", window=8)(source),
        dataclasses.replace(STAGE, clip=1.0),
    )
    whole, ledger = align.align(LayerwiseRun(source, target, stage, rows(), tmp_path / "whole"))
    seen: list[tuple[int, int]] = []

    def noting(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        assert steps == 12
        seen.append((row["layer"], step))

    def stopping(*told: Any) -> None:
        noting(*told)
        if len(seen) == cut:
            raise Killed

    run = LayerwiseRun(
        source, target, stage, rows(), tmp_path / "cut", scratch=tmp_path / "scratch"
    )
    with pytest.raises(Killed):
        align.align(dataclasses.replace(run, progress=stopping))
    if scratch:
        for file in (tmp_path / "scratch").iterdir():
            file.unlink()
    resumed, again = align.align(dataclasses.replace(run, progress=noting))
    expected = mixers(whole)
    assert all(torch.equal(value, expected[name]) for name, value in mixers(resumed).items())
    assert again["tokens"] == ledger["tokens"] and again["flops"] == ledger["flops"]
    lines = [
        json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(row["layer"], row["step"]) for row in lines] == [
        (at, n) for k, at in enumerate((0, 2, 3)) for n in range(4 * k + 1, 4 * k + 5)
    ]
    assert [row["loss"] for row in lines] == [
        json.loads(line)["loss"]
        for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(seen) == 12 + (cut - 1) % 4 + 1  # a layer that was finished is not trained again
    assert not list((tmp_path / "scratch").glob("hidden*"))


def test_only_one_layer_is_ever_there(tmp_path: Path, monkeypatch) -> None:
    source = opened(tmp_path, "gpt_neox", layers=5)
    held = []

    def counting(self: OneLayerModel, *given: Any) -> Any:
        layers = [
            *self.layers,
            self.model.get_input_embeddings(),
            self.model.get_output_embeddings(),
        ]
        real = [
            at
            for at, module in enumerate(layers)
            if any(not p.is_meta for p in module.parameters())
        ]
        held.append(real)
        return original(self, *given)

    original = OneLayerModel.run_decoder
    monkeypatch.setattr(OneLayerModel, "run_decoder", counting)
    align.align(LayerwiseRun(source, Remix(keep="3")(source), STAGE, rows(), tmp_path / "out"))
    assert {tuple(real) for real in held} == {
        (0,),
        (1,),
        (2,),
        (3,),
        (4,),
        (5,),
    }  # the fifth: the embedding


def test_a_layer_that_diverges_stops_the_run_and_earlier_ones_stay(tmp_path: Path) -> None:
    source = opened(tmp_path)
    target = Remix(keep="1", window=8)(source)
    run = LayerwiseRun(source, target, STAGE, rows(), tmp_path / "out")

    def spoil(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        if step == STAGE.steps:  # what the third layer gets is no number
            hidden = tmp_path / "out" / FOLDER / "hidden-0.0"
            hidden.write_bytes(b"\xff" * hidden.stat().st_size)

    with pytest.raises(
        RegraftError, match=r"layer 2: loss of .* is nan at step 1; .*finished layers \[0\] are in"
    ):
        align.align(dataclasses.replace(run, progress=spoil))


def test_hidden_states_in_bfloat16_come_close(tmp_path: Path) -> None:
    source = opened(tmp_path)
    target = Remix(keep="0")(source)
    exact = mixers(align.align(LayerwiseRun(source, target, STAGE, rows(), tmp_path / "a"))[0])
    near = mixers(
        align.align(LayerwiseRun(source, target, STAGE, rows(), tmp_path / "b", keep="bfloat16"))[0]
    )
    assert all((near[name] - exact[name]).abs().max() < 0.05 for name in exact)
    assert any(not torch.equal(near[name], exact[name]) for name in exact)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    source = opened(tmp_path)
    target = Remix(keep="0")(source)
    run = LayerwiseRun(source, target, STAGE, rows(), tmp_path / "out")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stage": dataclasses.replace(STAGE, kind="distil")}, "'distil' needs the whole model"),
        ({"stage": dataclasses.replace(STAGE, learn="lit")}, "learn 'lit' and window_drop"),
        ({"target": source}, "from a llama to a llama"),
        ({"target": Remix(keep="all")(source)}, "is no linearization"),
        ({"source": opened(tmp_path, "gpt2")}, "is no linearization"),
        ({"keep": "float8"}, "kept as 'float8'"),
    ]
    for change, message in cases:
        with pytest.raises(RegraftError, match=message):
            align.align(dataclasses.replace(run, **change))
    align.align(run)
    with pytest.raises(RegraftError, match="other settings"):
        align.align(dataclasses.replace(run, seed=1))


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch) -> None:
    source = opened(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        RegraftError, match="1,000 bytes free, the hidden states of 8 rows take 73,728"
    ):
        align.align(LayerwiseRun(source, Remix(keep="0")(source), STAGE, rows(), tmp_path / "out"))


PART = """
import sys
from pathlib import Path

from helpers.layerwise import STAGE, rows
from regraft import distributed
from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix
from regraft.train.layerwise import align
from regraft.train.layerwise.state import LayerwiseRun

with distributed.init_distributed():
    source, out = Checkpoint.open(sys.argv[1]), Path(sys.argv[2])
    target = Remix(keep="1", window=8)(source)
    trained, ledger = align.align(LayerwiseRun(source, target, STAGE, rows(), out, calibration=2))
    if distributed.is_rank0():
        trained.save(out / "model")
        (out / "tokens").write_text(str(ledger["tokens"]))
"""


@pytest.mark.usefixtures("forked_interpreter")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    source = opened(tmp_path, "qwen2")
    target = Remix(keep="1", window=8)(source)
    alone, ledger = align.align(
        LayerwiseRun(source, target, STAGE, rows(), tmp_path / "alone", calibration=2)
    )
    (closed,) = ledger["start"]
    assert (
        closed["kind"] == "closed form"
        and closed["tokens"] == 2 * rows().length
        and closed["flops"] > 0
    )
    assert json.loads((tmp_path / "alone" / FOLDER / "state.json").read_text())["start"] == closed
    assert ledger["flops"] == ledger["stages"][0]["flops"], "the closed form is no part of training"
    (tmp_path / "part.py").write_text(PART)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*torchrun, str(tmp_path / "part.py"), str(source.origin), str(tmp_path / "both")]
    paths = os.pathsep.join([str(TESTS), str(ROOT)])
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    both, expected = mixers(Checkpoint.open(tmp_path / "both" / "model")), mixers(alone)
    for name, value in both.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert (tmp_path / "both" / "tokens").read_text() == str(ledger["tokens"])
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in ("alone", "both")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 8
