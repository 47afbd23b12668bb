"""`torch.compile` makes one graph of the one-token step, of every mixer as of a stock Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.remixes import REMIXES
from helpers.tiny import save_model

from regraft.core.checkpoint import Checkpoint

QUICK = ("gated_deltanet-window", "lolcats")
OTHERS = tuple(name for name in REMIXES if name not in QUICK)
# Of the others one layer stands for all; a layer that is kept is in those of QUICK.
ALONE = {name: replace(REMIXES[name], keep="none") for name in OTHERS}


@pytest.mark.usefixtures("forked_interpreter")
@pytest.mark.parametrize(
    ("names", "kinds"),
    [(QUICK, "dynamic,static"), pytest.param(OTHERS, "dynamic", marks=pytest.mark.slow)],
    ids=["quick", "others"],
)
def test_the_one_token_step_is_one_graph(
    names: tuple[str, ...], kinds: str, tmp_path: Path
) -> None:
    """The kinds of caches have the same states of mixers: few models try both."""
    source = Checkpoint.open(save_model(tmp_path / "stock", layers=2 if names == QUICK else 1))
    for name in names:
        (ALONE.get(name) or REMIXES[name])(source).save(tmp_path / name)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.graphs", tmp_path, kinds, "stock", *names],
        capture_output=True, text=True, cwd=root / "tests",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"stock", *names}
    assert max(found.values()) < 1e-4, found
