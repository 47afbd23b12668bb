"""A command that is repeated after its end, in another process, says that it is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import read_files, save_model, write_text

COMMANDS = {
    "grow": ["grow", "model", "out", "--layers", "4"],
    "linearize": ["linearize", "model", "out", "--keep", "0", "--window", "8"],
    "train": "train model out --data text.txt --stage next --tokens 64 --length 32".split(),
}


@pytest.mark.usefixtures("forked_interpreter")
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_repeated_command_has_nothing_to_do(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt", documents=4)

    def run() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "regraft", *COMMANDS[name]]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert run().returncode == 0
    before = read_files(tmp_path)
    again = run()
    assert again.returncode == 0 and "is there already" in again.stdout + again.stderr
    assert read_files(tmp_path) == before
