"""On an accelerator every tensor is made where the model is: tried with fake tensors, without one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_device import ROWS
from helpers.tiny import save_model

from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix

ATTENTION = {"layout": "attention"}  # of the mixers that have another one
# One layer each: every mixer, and some beside a window.
REMIXES = {
    "window": Remix("window", "none", window=8, sinks=2),
    **{
        name: Remix(name, "none", window=0)
        for name in (
            "gated_deltanet", "supra", "t2r", "hedgehog", "retnet", "lightning", "gla", "rwkv6",
            "mamba", "mamba2",
        )
    },
    "lolcats": Remix("lolcats", "none", window=0, options={"window": 8}),
    "gated_deltanet-window": Remix("gated_deltanet", "none", window=8, sinks=2),
    "supra-window": Remix("supra", "none", window=8),  # with a norm
    "lightning-window": Remix("lightning", "none", window=8, options={"decays": "learned"}),
    "mamba-window": Remix("mamba", "none", window=8, options=ATTENTION),
    "mamba2-window": Remix("mamba2", "none", window=8, options=ATTENTION),
}  # fmt: skip


# Operations on fake tensors take long: these stand for all in every run.
QUICK = ("gated_deltanet-window", "supra-window", "rwkv6", "mamba", "lolcats")
GROUPS = {"quick": QUICK, "others": tuple(name for name in REMIXES if name not in QUICK)}
CASES = [
    pytest.param(group, name, id=name, marks=[pytest.mark.slow] if group == "others" else [])
    for group, names in GROUPS.items()
    for name in names
]


@pytest.fixture(scope="module")
def problems(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What went wrong, by `mixer-row`."""
    place, names = tmp_path_factory.mktemp("fake"), GROUPS[request.param]
    source = Checkpoint.open(save_model(place / "stock", layers=1))
    for name in names:
        REMIXES[name](source).save(place / name)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "helpers.fake_device", place, *names],
        capture_output=True, text=True, cwd=root / "tests",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("problems", "name"), CASES, indirect=["problems"])
def test_all_tensors_are_on_the_models_device(
    name: str, row: str, problems: dict[str, str]
) -> None:
    assert problems[f"{name}-{row}"] == ""


@pytest.mark.parametrize(("problems", "name"), CASES, indirect=["problems"])
def test_a_tensor_on_another_device_is_seen(name: str, problems: dict[str, str]) -> None:
    assert "two devices, gpu:0 and cpu" in problems[f"{name}-misplaced"]
