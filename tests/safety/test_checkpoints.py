"""A training checkpoint is used whole or not at all, and nothing in it is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layerwise import STAGE, rows
from helpers.tiny import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.io.files import write_json
from regraft.mixers.remix import Remix
from regraft.train.checkpoint_files import MANIFEST, METADATA, hash_file
from regraft.train.layerwise import align
from regraft.train.layerwise.state import FOLDER, LayerwiseRun
from regraft.train.output import RUN
from regraft.train.resume import RunState, list_checkpoints, load_state, save_state

SETTINGS = {"seed": 0, "stages": [{"learn": "no", "kind": "1e-3"}]}


def build_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train_steps(out: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Train and save after each step; the weights after each."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = RunState(changed=set(dict(model.named_parameters())))
    state.ledger_entry(0, "next", False)
    weights = []
    for _ in range(count):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state.step += 1
        state.trend.recent.append(float("nan") if state.step > 100 else 0.1 * state.step)
        save_state(out, model, optimizer, state, SETTINGS)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    return weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    out = tmp_path_factory.mktemp("saved")
    return out, train_steps(out, 3)


def newest(out: Path) -> Path:
    return list_checkpoints(out)[-1][2]


def rehash(folder: Path) -> None:
    """A manifest that fits the files as they are now, as an attacker would write it."""
    files = [file for file in folder.iterdir() if file.name != MANIFEST and file.is_file()]
    hashes = {file.name: hash_file(file) for file in files}
    write_json(folder / MANIFEST, {"version": 1, "files": hashes})


def is_state(state: RunState, model: nn.Module, step: int, weights: list[dict]) -> bool:
    loaded = model.state_dict()
    same = all(torch.equal(loaded[name], value) for name, value in weights[step - 1].items())
    return state.step == step and same and "exp_avg/0.weight" in state.moments


def test_the_newest_two_are_kept_and_read(saved: Any) -> None:
    out, weights = saved
    assert [step for _, step, _ in list_checkpoints(out)] == [2, 3]
    assert not list(out.rglob(".metadata"))
    model = build_model(1)
    state = load_state(out, model, SETTINGS)
    assert is_state(state, model, 3, weights) and state.ledger[0]["kind"] == "next"
    assert state.trend.recent == [0.1, 0.2, 0.1 * 3]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "fifo", "folder", "longer"])
@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, "state.json", MANIFEST])
def test_any_damage_means_the_one_before(
    name: str, how: str, saved: Any, tmp_path: Path, capsys: Any
) -> None:
    out, weights = saved
    shutil.copytree(out, tmp_path / "out")
    file = newest(tmp_path / "out") / name
    raw = bytearray(file.read_bytes())
    file.unlink()
    if how == "flip":
        raw[len(raw) // 2] ^= 4
        file.write_bytes(raw)
    elif how == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "longer":
        file.write_bytes(raw + b"x")
    elif how == "fifo":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()

    model = build_model(1)
    state = load_state(tmp_path / "out", model, SETTINGS)
    lines = capsys.readouterr().err.splitlines()
    assert is_state(state, model, 2, weights)
    assert len(lines) == 1 and "step-3' is damaged" in lines[0] and "step-2'" in lines[0]

    # The next checkpoint takes the damaged one's place.
    state.step = 3
    optimizer = torch.optim.AdamW(model.parameters())
    state.restore_optimizer(model, optimizer)
    save_state(tmp_path / "out", model, optimizer, state, SETTINGS)
    assert load_state(tmp_path / "out", build_model(1), SETTINGS).step == 3
    assert not capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error_and_not_a_new_run(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "out")
    for *_, folder in list_checkpoints(tmp_path / "out"):
        (folder / MANIFEST).unlink()
    with pytest.raises(RegraftError, match="no older one is whole: delete '.*run' to begin again"):
        load_state(tmp_path / "out", build_model(), SETTINGS)


def test_a_damaged_later_checkpoint_does_not_push_out_whole_ones(
    saved: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(saved[0], out)
    newest(out).rename(out / RUN / "stage-0-step-30")
    (newest(out) / "state.json").write_text("{")
    model = build_model()
    state = load_state(out, model, SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (3, 4, 5):
        state.step = step
        save_state(out, model, optimizer, state, SETTINGS)
    assert [step for _, step, _ in list_checkpoints(out)] == [4, 5]


def test_other_settings_and_other_models_are_no_damage(saved: Any) -> None:
    with pytest.raises(RegraftError, match="other settings"):
        load_state(saved[0], build_model(), SETTINGS | {"seed": 1})
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(RegraftError, match="of shape"):
        load_state(saved[0], other, SETTINGS)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_nothing_is_unpickled(saved: Any, tmp_path: Path) -> None:
    """Files of an attacker, with a manifest that fits them."""
    sprung = tmp_path / "sprung"
    evil = pickle.dumps(Evil(sprung))
    for name in (".metadata", "__0.metadata", "__0_0.distcp", METADATA, "state.json", MANIFEST):
        out = tmp_path / name.strip("._")
        shutil.copytree(saved[0], out)
        for *_, folder in list_checkpoints(out):
            size = (folder / "__0_0.distcp").stat().st_size
            (folder / name).write_bytes(evil + bytes(size if name.endswith("distcp") else 0))
            if name != MANIFEST:
                rehash(folder)
        try:
            load_state(out, build_model(), SETTINGS)
            assert name.endswith(".metadata")
        except RegraftError as error:
            assert "\n" not in str(error)
    torch.save(Evil(sprung), tmp_path / "evil.pt")
    assert not sprung.exists()


CHANGES = [
    ("state.json", ("step",), "x"),
    ("state.json", ("changed",), {"a": 1}),
    ("state.json", ("changed", 0), [1]),
    ("state.json", ("ledger",), [1]),
    ("state.json", ("watch",), None),
    ("state.json", ("trend", "recent"), {"class_path": "os.system"}),
    ("state.json", ("costs",), [1]),
    ("state.json", ("unknown",), 1),
    (METADATA, ("tensors", "model/0.weight", "dtype"), "save"),
    (METADATA, ("tensors", "model/0.weight", "size"), [10**9, 10**9]),
    (METADATA, ("tensors", "model/0.weight", "size"), [-4, -3]),
    (METADATA, ("tensors", "model/0.weight", "size"), [4]),
    (METADATA, ("tensors", "model/0.weight", "chunks"), []),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "file"), "../../x.distcp"),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "file"), "/etc/passwd"),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "start"), -1),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "length"), 10**12),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "offset"), [1, 0]),
    (METADATA, ("tensors", "model/0.weight", "chunks", 0, "size"), [2]),
    (METADATA, ("other",), 1),
    (MANIFEST, ("version",), 2),
    (MANIFEST, ("files", "../x"), "0"),
    (MANIFEST, ("files",), {}),
    (MANIFEST, ("files",), []),
]


@pytest.mark.parametrize(("name", "place", "value"), CHANGES, ids=str)
def test_values_of_another_kind_are_damage(
    name: str, place: tuple[Any, ...], value: Any, saved: Any, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(saved[0], out)
    folder = newest(out)
    facts = json.loads((folder / name).read_text())
    target = facts
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    (folder / name).write_text(json.dumps(facts))
    if name != MANIFEST:
        rehash(folder)
    assert load_state(out, build_model(), SETTINGS).step == 2
    assert "is damaged" in capsys.readouterr().err


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_flipped_bit_is_seen(data: st.DataObject, saved: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(saved[0], out)
    file = data.draw(st.sampled_from(sorted(newest(out).iterdir())))
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    # A blank of the manifest may become another blank: its facts are then the same.
    step = load_state(out, build_model(), SETTINGS).step
    assert step == 2 or file.name == MANIFEST


@pytest.mark.parametrize("how", ["flip", "gone"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_damaged_layer_is_trained_again(
    layer: int, how: str, tmp_path: Path, capsys: Any
) -> None:
    tiny("llama", layers=4)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    target = Remix("gla", "1", window=0)(source)
    run = LayerwiseRun(source, target, STAGE, rows(), tmp_path / "out")

    def describe(trained: Checkpoint, ledger: Any) -> Any:
        values = [lazy.read() for lazy in trained.tensors.values()]
        return values, ledger["tokens"], ledger["flops"]

    values, *costs = describe(*align.align(run))
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    file = tmp_path / "out" / FOLDER / f"layer-{layer}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.unlink()
    if how == "flip":
        file.write_bytes(raw)

    values_again, *costs_again = describe(*align.align(run))
    assert f"layer-{layer}.safetensors' is damaged" in capsys.readouterr().err
    assert all(map(torch.equal, values, values_again)) and costs_again == costs

    def losses(text: str) -> list[Any]:
        return [(row["layer"], row["loss"]) for row in map(json.loads, text.splitlines())]

    assert losses((tmp_path / "out" / "metrics.jsonl").read_text()) == losses(metrics)
