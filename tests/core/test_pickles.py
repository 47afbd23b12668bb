"""`regraft convert` on pickled weights: their tensors, and nothing that would be run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused, run_main
from helpers.tiny import save_model
from safetensors.torch import load_file

from regraft import RegraftError
from regraft.core.checkpoint import Checkpoint
from regraft.io.files import write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole") / "model", layers=2)


def pickled(whole: Path, folder: Path, files: int) -> dict[str, torch.Tensor]:
    """Write a model with .bin files; its tensors."""
    shutil.copytree(whole, folder)
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    if files == 1:
        torch.save(values, folder / "pytorch_model.bin")
        return values
    weight_map = {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = names[number::files]
        torch.save({name: values[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    return values


@pytest.mark.parametrize("files", [1, 2])
def test_tensors_and_files_beside_them_are_kept(files, whole, tmp_path, capsys):
    values = pickled(whole, tmp_path / "bin", files)
    (tmp_path / "bin" / "model.py").write_text("raise SystemExit")
    line = refused(capsys, "plan", tmp_path / "bin", "--ffn", 96)
    assert "regraft convert" in line

    for _ in range(2):  # the same command again changes nothing
        said = as_json(capsys, "convert", tmp_path / "bin", tmp_path / "out")
        assert len(said["pickles"]) == files
    made = Checkpoint.open(tmp_path / "out")
    for key, lazy in made.tensors.items():
        assert torch.equal(lazy.read(), values[made.names[key]])
    beside = {file.name for file in (tmp_path / "out").iterdir()} - {".regraft.json"}
    kept = {file.name for file in whole.iterdir()} - {"model.safetensors"}
    assert beside - kept == set(
        ["model.safetensors"]
        if files == 1
        else [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        + ["model.safetensors.index.json"]
    )
    assert kept <= beside
    code, _, err = run_main(capsys, "grow", tmp_path / "out", tmp_path / "grown", "--ffn", 96)
    assert code == 0, err


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("content", ["evil", "evil in a zip", "a list", "cut", "missing"])
def test_anything_else_is_refused_and_not_run(content, whole, tmp_path, capsys):
    folder, sprung = tmp_path / "bin", tmp_path / "sprung"
    values = pickled(whole, folder, 2)
    file = folder / "pytorch_model-00002-of-00002.bin"
    if content == "evil":
        file.write_bytes(pickle.dumps(Evil(sprung)))
    elif content == "evil in a zip":
        torch.save({"a": Evil(sprung)}, file)
    elif content == "a list":
        torch.save([next(iter(values.values()))], file)
    elif content == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    else:
        file.unlink()
    line = refused(capsys, "convert", folder, tmp_path / "out")
    assert file.name in line
    assert not sprung.exists() and not (tmp_path / "out").exists()


def test_a_pickle_of_another_name(whole, tmp_path):
    pickled(whole, tmp_path / "bin", 1)
    (tmp_path / "bin" / "pytorch_model.bin").rename(tmp_path / "bin" / "weights.pt")
    with pytest.raises(RegraftError, match="call it pytorch_model.bin, then `regraft convert`"):
        Checkpoint.open(tmp_path / "bin")
