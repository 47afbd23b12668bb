"""Models that regraft made and something changed since are no sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cli import run_main
from helpers.gguf import save_for_gguf
from safetensors.torch import load_file, save_file

from regraft.core.checkpoint import Checkpoint
from regraft.growth.steps.widen import Widen


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A grown model with one number changed."""
    source = Checkpoint.open(save_for_gguf(tmp_path / "source"))
    Widen(ffn=60)(source).save(tmp_path / "grown")
    file = tmp_path / "grown" / "model.safetensors"
    values = load_file(file)
    values["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(values, file, metadata={"format": "pt"})
    return tmp_path / "grown"


@pytest.mark.parametrize(
    "words",
    [
        "grow {} {} --layers 6",
        "linearize {} {} --mixer window --keep 0",
        "convert {} {}",
        "export {} {} --to hf",
        "export {} {} --to gguf",
        "shrink {} {}",
    ],
)
def test_nothing_is_made_of_a_damaged_model(
    words: str, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(capsys, *words.format(damaged, tmp_path / "out").split())
    assert code == 2 and out == ""
    assert "model.safetensors' is damaged" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
