"""Several processes train what one does: losses, weights, FLOPs; checkpoints go on in any number of
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, TESTS
from helpers.tiny import save_model, write_text
from helpers.torchrun import STAGES, STEPS, train_ligo_maps, train_stage
from safetensors.torch import load_file

from regraft.core.checkpoint import Checkpoint
from regraft.io.output import lock_folder
from regraft.mixers.remix import Remix
from regraft.train.output import RUN, WORK
from regraft.train.resume import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_interpreter")]

PYTHON = sys.executable  # the real one, whose children have it as their parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    save_model(folder / "source")
    source = Checkpoint.open(folder / "source")
    for name, window in {"linear": 8, "bare": 0}.items():
        Remix("lightning", keep="0", window=window, sinks=2)(source).save(folder / name)
    write_text(folder / "text.txt")
    return folder


def torchrun(count: int, *words: object, python: str = "") -> list[str]:
    launcher = [
        python or sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    return [*launcher, *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}


def launched(count: int, *words: object) -> None:
    done = subprocess.run(
        torchrun(count, *words), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def words_of(place: Path) -> bytes:
    """The command line of a process; nothing of one that is gone."""
    with contextlib.suppress(OSError):
        return place.read_bytes()
    return b""


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def same(one: Path, other: Path, tolerance: float) -> None:
    """Both runs trained the same model: losses, evaluations, FLOPs, files and weights."""
    first, second = rows(one), rows(other)
    spent = [[row["flops"] for row in table] for table in (first, second)]
    assert spent[0] == pytest.approx(
        spent[1], rel=0.01
    )  # counted on the first rows, which may hold fewer documents
    assert [row.get("unfrozen") for row in first] == [row.get("unfrozen") for row in second]
    for key in ("loss", "eval_loss", "eval_kl"):
        mine, theirs = ([row[key] for row in table if key in row] for table in (first, second))
        assert mine == pytest.approx(theirs, rel=tolerance), key
    kept = {file.name for file in one.iterdir()} - {WORK.name}
    assert kept == {file.name for file in other.iterdir()} - {WORK.name}
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("count", "names"),
    [(2, [*STAGES, "broken rank"]), (3, ["rank", "align"])],
)
def test_processes_train_as_one(count: int, names: list[str], models: Path, tmp_path: Path) -> None:
    """Also a run of low-rank additions that was given up half-way, and sharded rows of unlike
    numbers.
    """
    launched(count, TESTS / "helpers" / "torchrun.py", models, tmp_path / "many", *names)
    for name in names:
        alone = tmp_path / "one" / name.removeprefix("broken ")
        if not alone.exists():
            train_stage(alone.name, models, alone)
        assert len(losses(alone)) == STEPS
        same(alone, tmp_path / "many" / name, 1e-5)


def test_processes_fit_growth_as_one(models: Path, tmp_path: Path) -> None:
    launched(2, TESTS / "helpers" / "torchrun.py", models, tmp_path / "many", "ligo")
    cost = train_ligo_maps(models, tmp_path / "one")
    told = json.loads((tmp_path / "many" / "ligo" / "losses.json").read_text())
    mine = json.loads((tmp_path / "one" / "losses.json").read_text())
    assert len(mine["loss"]) == STEPS and mine["loss"] == pytest.approx(told["loss"], rel=1e-5)
    assert (
        told["tokens"] == cost["tokens"] and told["overhead"] < 3 * cost["overhead"]
    )  # each makes all weights
    left, right = (
        load_file(place / "model.safetensors")
        for place in (tmp_path / "one", tmp_path / "many" / "ligo")
    )
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-4)


def test_two_machines_with_a_model_each_train_as_one(models: Path, tmp_path: Path) -> None:
    place = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        tmp_path.name,
    ]
    port = 20000 + os.getpid() % 20000
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, "--rdzv-endpoint", f"localhost:{port}",
             str(TESTS / "helpers" / "torchrun.py"), str(models), str(tmp_path / "many"), "hybrid", "distil"],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [agent.communicate(timeout=600)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told[0][-2000:] + told[1][-2000:]
    train_stage("distil", models, tmp_path / "one")
    same(tmp_path / "one", tmp_path / "many" / "distil", 1e-5)


class TestCommand:
    """`torchrun .. -m regraft train`: stopped, killed, and gone on with in any number of processes."""

    @staticmethod
    def words(models: Path, out: Path, **flags: object) -> list[object]:
        flags = {
            "tokens": 12 * 32 * 24,
            "batch": 12,
            "length": 32,
            "stage": "distil",
            "precision": "float32",
        } | flags
        flags = {
            "data": models / "text.txt",
            "teacher": models / "source",
            "save-seconds": 0,
        } | flags
        flat = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        return ["-m", "regraft", "train", models / "linear", out, *flat]

    def until(
        self, count: int, out: Path, number: signal.Signals, steps: int, words: list[object]
    ) -> None:
        """Start, send a signal to the processes once so many steps are done, wait."""
        command = torchrun(count, *words) if count > 1 else [sys.executable, *map(str, words)]
        told = out.with_suffix(".log")
        with told.open("w") as log:
            begun = subprocess.Popen(command, env=environment(), stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < steps:
            assert begun.poll() is None and time.monotonic() < deadline, told.read_text()[-3000:]
            time.sleep(0.05)
        if (
            number == signal.SIGKILL
        ):  # the launcher and the processes it started, which are in sessions of their own
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                if str(out).encode() in words_of(place):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(place.parent.name), number)
        else:
            begun.send_signal(number)
        assert begun.wait(timeout=120) != 0

    def test_a_run_goes_on_in_another_number_of_processes(
        self, models: Path, tmp_path: Path
    ) -> None:
        words = self.words(models, tmp_path / "many")
        self.until(2, tmp_path / "many", signal.SIGKILL, 4, words)
        self.until(1, tmp_path / "many", signal.SIGTERM, 12, words)
        kept = max(
            tmp_path.glob(f"many/{RUN}/stage-0-step-*"),
            key=lambda folder: int(folder.name.rpartition("-")[2]),
        )
        assert len(losses(tmp_path / "many")) == int(
            kept.name.rpartition("-")[2]
        )  # SIGTERM loses no step
        launched(3, *words)
        subprocess.run(
            [sys.executable, *map(str, self.words(models, tmp_path / "one"))],
            env=environment(),
            check=True,
        )
        same(tmp_path / "one", tmp_path / "many", 1e-4)

    def test_as_many_processes_go_on_bit_for_bit(self, models: Path, tmp_path: Path) -> None:
        launched(2, *self.words(models, tmp_path / "whole"))
        words = self.words(models, tmp_path / "broken")
        self.until(2, tmp_path / "broken", signal.SIGKILL, 4, words)
        self.until(2, tmp_path / "broken", signal.SIGTERM, 12, words)
        launched(2, *words)
        assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
        files = [tmp_path / kind / "model.safetensors" for kind in ("broken", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

    @pytest.mark.skipif(
        sys.platform != "linux", reason="only Linux tells a process that its parent died"
    )
    @pytest.mark.parametrize(
        "seconds", [0, 600]
    )  # killed in the middle of a checkpoint, or before any
    def test_a_launcher_that_is_killed_leaves_nobody_behind(
        self, seconds: int, models: Path, tmp_path: Path
    ) -> None:
        """Its processes finish the step, keep a checkpoint and end."""
        out = tmp_path / "out"
        words = self.words(models, out, **{"save-seconds": seconds})
        command = torchrun(2, *words, python=PYTHON)
        with (tmp_path / "log").open("wb") as log:
            begun = subprocess.Popen(command, env=environment(), stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < 3:
            assert begun.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        begun.kill()
        begun.wait()
        while any(
            str(out).encode() in words_of(place) for place in Path("/proc").glob("[0-9]*/cmdline")
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        told = (tmp_path / "log").read_text()
        assert list_checkpoints(out)[-1][1] == len(losses(out)) and "stopped by SIGTERM" in told, (
            told
        )

    def test_two_runs_do_not_write_in_one_folder(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with lock_folder(tmp_path / "a"):
            words = [*map(str, self.words(models, tmp_path / "a"))]
            done = subprocess.run(
                [sys.executable, *words], env=environment(), capture_output=True, text=True
            )
        assert done.returncode == 2 and "another run is writing" in done.stderr

    def test_wrong_use_is_told_once_and_plainly(self, models: Path, tmp_path: Path) -> None:
        def refused(*words: object) -> str:
            done = subprocess.run(
                torchrun(2, *words), env=environment(), capture_output=True, text=True, timeout=300
            )
            assert done.returncode != 0
            told = [line for line in done.stderr.splitlines() if line.startswith("regraft: ")]
            told = [line for line in told if not line.endswith(" used")]  # progress, where slow
            assert len(told) == 1, done.stderr
            return told[0]

        assert "a batch of 3 does not split over 2 processes" in refused(
            *self.words(models, tmp_path / "a", batch=3)
        )
        assert "'plan' runs in one process" in refused("-m", "regraft", "plan", models / "source")


def test_a_comparison_launches_each_run_over_processes(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    stage = {"tokens": 640, "length": 16, "batch": 8}
    arms = [
        {"name": "scratch", "scratch": True},
        {"name": "state", "grow": {"width_init": "pad", "depth_init": "stack"}, "moments": True},
    ]
    recipe = {
        "task": "next", "source": sizes | {"model_type": "llama"}, "target": {"hidden": 24, "ffn": 48, "layers": 2},
        "vocabulary": 260, "pretrain": stage, "train": stage, "arms": arms, "seeds": [0], "every": 5, "rows": 8,
    }  # fmt: skip
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"the {i} laws of the land are {i * i}" for i in range(200))
    )
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"data": str(tmp_path / "text.txt")})
    )
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    for name, flags in {"one": [], "two": ["--launch", launch]}.items():
        words = [
            "-m",
            "regraft",
            "compare",
            str(tmp_path / "recipe.yaml"),
            str(tmp_path / name),
            *flags,
        ]
        done = subprocess.run(
            [sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=600
        )
        logs = "".join(file.read_text()[-3000:] for file in tmp_path.glob(f"{name}/logs/arm-*.txt"))
        assert done.returncode == 0, done.stderr[-2000:] + logs
    for place in ("sources/source/0", "arms/scratch/0", "arms/state/0"):
        one, two = (losses(tmp_path / name / place) for name in ("one", "two"))
        assert len(one) == 5 and one == pytest.approx(two, rel=1e-4), place


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    models: Path, small_disk: Path
) -> None:
    words = TestCommand.words(models, small_disk / "out")
    command = torchrun(2, *words)
    (small_disk / "filler").write_bytes(bytes(5_600_000))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    told = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("regraft: cannot write the checkpoint")
    ]
    assert (
        done.returncode != 0
        and told
        and "No space left" in told[0]
        and "free some space" in told[0]
    ), done.stderr
    kept = list_checkpoints(small_disk / "out")
    assert kept and not (small_disk / "out" / RUN / "new").exists()
    (small_disk / "filler").unlink()
    launched(2, *words)
    assert (
        len(losses(small_disk / "out")) == 24
        and (small_disk / "out" / "model.safetensors").exists()
    )


def test_a_process_without_its_launcher_does_not_wait_for_ever() -> None:
    code = (
        "from datetime import timedelta; from regraft import distributed; distributed.RENDEZVOUS_TIMEOUT ="
        " timedelta(seconds=1)\n"
    )
    code += "with distributed.init_distributed(): pass"
    place = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }
    alone = (
        environment()
        | place
        | {
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=alone, capture_output=True, text=True, timeout=300
    )
    assert "RegraftError: process 1 found no launcher within 0:00:01" in done.stderr
