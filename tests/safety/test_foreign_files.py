"""Files that regraft did not write are as they were, after every verb with every flag that touches
the disk, in folders of every kind. `benchmarks/foreign_files.py` tries all of them.
"""

from __future__ import annotations

import pytest
from helpers.foreign import COMMANDS, make_world
from helpers.foreign_folders import FOLDERS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# One that replaces, one that trains, one that trains layer by layer.
REPLACE = "grow --optimizer-state --overwrite"
CONVERT = "linearize --tokens --overwrite"
FAST = [name for name in COMMANDS if name not in ("demo", "bench --plot", "compare", "run")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, server):
    return make_world(tmp_path_factory.mktemp("foreign"), server)


def test_there_are_forty_folders():
    assert len(FOLDERS) >= 40


@pytest.mark.parametrize("folder", FOLDERS)
def test_overwrite_replaces_only_what_regraft_wrote(folder, world):
    assert not world.try_command(world.case(FOLDERS[folder]), COMMANDS[REPLACE])


@pytest.mark.slow
@pytest.mark.parametrize("folder", list(FOLDERS)[::3])
def test_training_keeps_what_it_did_not_write(folder, world):
    assert not world.try_command(world.case(FOLDERS[folder]), COMMANDS["train --teacher-cache"])


@pytest.mark.slow
@pytest.mark.parametrize("folder", list(FOLDERS)[1::3])
def test_converting_keeps_what_it_did_not_write(folder, world):
    assert not world.try_command(world.case(FOLDERS[folder]), COMMANDS[CONVERT])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "verb"),
    [
        ("pictures in the current folder", "eval --plot"),
        ("pictures in the current folder", "bench --plot"),
        ("picture links in the current folder", "eval --plot"),
        ("cache of the demo", "demo"),
        ("download of the demo", "demo"),
        ("comparison with paths as names", "compare"),
        ("comparison with dots as names", "compare"),
        ("recipe that fits", "compare"),
        ("recipe that fits", "run"),
        ("recipe in the output", "run"),
        ("recipe in the output", "compare"),
        ("caches of other programs", "train --stream --scratch"),
        ("home as caches", "train --stream --scratch"),
    ],
)
def test_other_places_that_are_written(folder, verb, world):
    assert not world.try_command(world.case(FOLDERS[folder]), COMMANDS[verb])


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example("only run and work", ["train"])
@example("only stream", ["train --stream"])
@example("only names of a run", ["train --stream"])
@example("hidden siblings", ["grow LiGO --overwrite"])
@example("caches are the output", ["train --teacher-cache"])
@example("caches of other programs", ["train --teacher-cache"])
@given(st.sampled_from(sorted(FOLDERS)), st.lists(st.sampled_from(FAST), min_size=1, max_size=2))
def test_any_verb_in_any_folder(world, folder, verbs):
    """One verb or two after each other, as the folder is after the first."""
    case = world.case(FOLDERS[folder])
    for verb in verbs:
        assert not world.try_command(case, COMMANDS[verb]), verb


def test_what_regraft_wrote_is_replaced(world):
    """The other side: an output of regraft that nobody has changed."""
    case = world.case(FOLDERS["finished model"])
    before = (case.o / "model.safetensors").read_bytes()
    assert not world.try_command(case, COMMANDS["grow --overwrite"])
    assert (case.o / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("folder", ["siblings", "partial folder", "model beside user files"])
def test_what_lies_beside_does_not_hinder(folder, world):
    """Names that a program might use for itself are no reason to refuse a new output."""
    case = world.case(FOLDERS[folder])
    case.out = str(case.place / "o" if not case.owned else case.place / "new")
    assert not world.try_command(case, COMMANDS["grow"])
    assert (case.place / case.out / "config.json").exists()
