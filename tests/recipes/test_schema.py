"""Reading a recipe is cheap: a wrong one is reported before PyTorch is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import sys
from importlib import import_module
from regraft.errors import RegraftError

module, file = sys.argv[1:]
try:
    print(type(import_module(module).load(file, {})).__name__)
except RegraftError as error:
    print(error)
print("torch" in sys.modules)
"""
RUN = "source: model\ntrain: [{path: text.txt}]\nmethod: supra\ntokens: 100000\nminutes: 3\n"
COMPARISON = """
task: next
source: model
pretrain: {tokens: 100000}
target: {layers: 4}
train: {tokens: 100000, length: 64}
arms:
  - {name: plain, scratch: true}
  - {name: grown, grow: {}}
  - {name: learned, ligo: {steps: 3}}
"""


@pytest.mark.parametrize(
    ("module", "text", "answer"),
    [
        ("regraft.recipes.schema", RUN, "Recipe"),
        ("regraft.recipes.schema", RUN + "minuets: 3\n", "minuets"),
        ("regraft.compare.recipe", COMPARISON, "Comparison"),
        ("regraft.compare.recipe", COMPARISON.replace("grow: {}", "grow: {to: x}"), "to"),
    ],
)
def test_reading_imports_no_torch(module: str, text: str, answer: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    command = [sys.executable, "-c", READ, module, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, torch = done.stdout.splitlines()
    assert answer in " ".join(said)
    assert torch == "False"
