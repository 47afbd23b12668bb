"""Models whose classes are code beside the weights: run only with --trust-remote-code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import tiny

from regraft.cli.main import main
from regraft.core.custom_code import run_custom_code
from regraft.errors import RegraftError

CODE = """
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(__file__).with_name("ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own_for_tests"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {
    "model_type": "own_for_tests",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    },
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a class of its own; caches of tables and of code are empty."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "source"
    tiny("llama")[1].save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    rewrite(folder, **OWN)
    return folder


def rewrite(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_code_runs_with_the_flag_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", str(source), str(tmp_path / "out"), "--layers", "5"]) == 2
    said = capsys.readouterr().err
    assert "unknown family 'own_for_tests'" in said and "--trust-remote-code" in said
    assert not [*tmp_path.rglob("ran")]

    script = [
        "import sys; from regraft.cli.main import main",
        f"source, out = {str(source)!r}, {str(tmp_path / 'out')!r}",
        "trust = ['--trust-remote-code']",
        "grown = main(['grow', source, out, '--layers', '5', '--hidden', '48', *trust])",
        "sys.exit(grown or main(['check', source, out, *trust]))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "own_for_tests: proven for layers, hidden, ffn" in done.stderr
    # The result names the code that it is loaded with, and has it.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == OWN["auto_map"]
    assert (tmp_path / "out" / "modeling_own.py").read_text() == CODE


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"auto_map": {"AutoConfig": "somebody/else--x.X"}}, "code of another repository"),
        ({"auto_map": {"AutoConfig": "modeling_none.X"}}, "does not run"),
    ],
)
def test_code_that_is_refused(source: Path, keys: dict[str, object], words: str) -> None:
    rewrite(source, **keys)
    with pytest.raises(RegraftError, match=words):
        run_custom_code(source, trusted=True)
    assert not run_custom_code(source, trusted=False)
    # A type of transformers loads with its own class.
    rewrite(source, model_type="llama")
    assert not run_custom_code(source, trusted=True)
