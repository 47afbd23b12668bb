"""On an accelerator every tensor is made where the model is: tried with fake tensors, without one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_device import ROWS
from helpers.faults import ForkServer
from helpers.remixes import ATTENTION
from helpers.tiny import save_model

from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix

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
OTHERS = tuple(name for name in REMIXES if name not in QUICK)
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
Find = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Find:
    """From a name in REMIXES, what went wrong by `name-row`; of QUICK or OTHERS in one process."""

    @functools.cache
    def run(names: tuple[str, ...]) -> dict[str, str]:
        place = tmp_path_factory.mktemp("fake")
        source = Checkpoint.open(save_model(place / "stock", layers=1))
        for name in names:
            REMIXES[name](source).save(place / name)
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [server.python, "-m", "helpers.fake_device", place, *names],
            capture_output=True, text=True, cwd=root / "tests",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    return lambda name: run(QUICK if name in QUICK else OTHERS)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_all_tensors_are_on_the_models_device(name: str, row: str, find: Find) -> None:
    assert find(name)[f"{name}-{row}"] == ""


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_on_another_device_is_seen(name: str, find: Find) -> None:
    assert "two devices, gpu:0 and cpu" in find(name)[f"{name}-misplaced"]
