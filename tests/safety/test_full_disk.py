"""A disk that fills, or has no inodes left, at any stage of a command: one line, nothing that looks
finished, the old output as it was; with space the same command ends with the bytes of a run that
nobody disturbed. `benchmarks/kill_everywhere.py` tries every stage.
"""

from __future__ import annotations

import errno
import shutil
import subprocess

import pytest
from helpers.faults import NO_INODES, NO_SPACE, SYNC, WRITE
from helpers.kill import COMMANDS, begin_trial, read_tree, sample_points

QUICK = ("grow", "grow with moments", "grow with moments over a model", "linearize over a model")
LONG = {name: 2 for name in COMMANDS if name.startswith("train")}
LONGEST = {name: 1 for name in COMMANDS if name not in QUICK and name not in LONG}
SAMPLES = {name: 4 for name in QUICK} | LONG | LONGEST
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name != "grow"]


@pytest.fixture
def trial(request, safety_folder, faults):
    return begin_trial(request.param, safety_folder, faults)


def failures(trial, kinds: int, count: int, **options) -> dict[str, list[str]]:
    """What is wrong when changes of some kinds fail from some of them on."""
    points = sample_points(trial.changes, kinds, count // 2, count - count // 2)
    return {
        f"from {at} on ({trial.changes[at - 1]})": found
        for at in points
        if (found := trial.fail_at(at, kinds, **options))
    }


@pytest.mark.parametrize("trial", ["grow", *SLOW], indirect=True)
def test_no_space_and_no_inodes(trial, request):
    name = request.node.callspec.params["trial"]
    assert not failures(trial, NO_SPACE, SAMPLES[name], torn=True)
    # What makes files is the same code in the longest commands.
    if name not in LONGEST:
        assert not failures(trial, NO_INODES, SAMPLES[name] // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial", ["grow with moments", "train next", "linearize and train over a model"], indirect=True
)
def test_a_disk_that_breaks_for_a_moment(trial):
    """One write or flush fails, and all later ones work."""
    points = sample_points(trial.changes, WRITE | SYNC, 2, 2)
    problems = {
        f"at {at} ({trial.changes[at - 1]})": found
        for at in points
        if (found := trial.fail_at(at, WRITE | SYNC, error=errno.EIO, until=at + 1))
    }
    assert not problems


@pytest.mark.parametrize("limit", ["size=120k", "nr_inodes=6"])
def test_a_real_disk(limit, safety_folder, server, tmp_path):
    """The same on a file system of its own, as the shell's `mount` makes it."""
    place, inputs = tmp_path / "disk", safety_folder / "in"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted")
    try:
        words = ["grow", str(inputs / "source"), str(place / "out"), "--layers", "3"]
        words += ["--optimizer-state", str(inputs / "moments.safetensors")]
        full = server.run(words, tmp_path)
        assert full.code == 2 and full.said.startswith("regraft: "), full.err
        assert not (place / "out" / "config.json").exists()

        larger = ["mount", "-o", "remount,size=20m,nr_inodes=1000", str(place)]
        subprocess.run(larger, check=True)
        assert server.run(words, tmp_path).code == 0
        words[2] = str(tmp_path / "out")
        assert server.run(words, tmp_path).code == 0
        found, whole = read_tree(place / "out"), read_tree(tmp_path / "out")
        assert found == whole
        assert [path.name for path in place.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(place)], check=True)
