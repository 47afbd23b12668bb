"""The names of `import regraft`: listed, lazy, true to the stub, no builtin among them;
registration with transformers.
"""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import pytest

import regraft

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, *arguments: str) -> None:
    """Run code in a new process, which has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", regraft.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    found = getattr(regraft, name)
    assert found.__doc__ and name in dir(regraft)


def test_names_that_are_not_there_are_attribute_errors() -> None:
    assert not hasattr(regraft, "grow_everything")
    with pytest.raises(ImportError, match="grow_everything"):
        exec("from regraft import grow_everything")


def test_star_import_shadows_no_builtin() -> None:
    assert not set(regraft.__all__) & set(vars(builtins))
    assert "open" in dir(regraft) and regraft.open is not builtins.open


def test_importing_regraft_is_light() -> None:
    run_python(
        "import sys, regraft\n"
        "dir(regraft), regraft.__all__, regraft.RegraftError\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_importing_modeling_first_registers() -> None:
    """Other orders of imports: tests/modeling/test_remote_code.py."""
    run_python(
        "import regraft.modeling\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        'config = AutoConfig.for_model("regraft", num_hidden_layers=1)\n'
        "assert type(config) is regraft.modeling.RegraftConfig\n"
        "assert type(config) in AutoModelForCausalLM._model_mapping\n"
    )
