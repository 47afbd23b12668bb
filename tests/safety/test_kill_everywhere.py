"""A command that is killed at any change of the file system is finished by the same command, with
the bytes of a run that nobody disturbed. `benchmarks/kill_everywhere.py` tries every change.
"""

from __future__ import annotations

import pytest
from helpers.faults import KINDS, WRITE
from helpers.kill import COMMANDS, begin_trial, sample_points
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EVERY_KIND = sum(KINDS)
# Of the changes of a command: how many of the last, and how many of those before them.
QUICK, LONG, LONGEST = (3, 1), (1, 1), (1, 0)
SAMPLES = {
    name: QUICK
    if name.startswith(("grow", "linearize")) and " and " not in name and "measured" not in name
    else LONGEST
    if name in ("run", "compare", "linearize with measured layers")
    else LONG
    for name in COMMANDS
} | {"grow with LiGO": LONG}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name != "grow"]


@pytest.mark.parametrize("name", ["grow", *SLOW])
def test_the_same_command_goes_on_after_a_kill(name, safety_folder, faults):
    """In between nothing unfinished looks finished, and what --overwrite replaces is whole until
    the new output is; in the end there is no file that the undisturbed run does not leave. After
    that the command has nothing to do.
    """
    trial = begin_trial(name, safety_folder, faults)
    assert not trial.repeat()
    last, spread = SAMPLES[name]
    kills = {
        (at, at % 2 == 1 and trial.changes[at - 1].kind == WRITE)
        for at in sample_points(trial.changes, EVERY_KIND, last, spread)
    }
    kills |= {(at, True) for at in sample_points(trial.changes, WRITE, 1, min(spread, 1))}
    problems = {
        f"{'in the middle of' if torn else 'before'} {at} ({trial.changes[at - 1]})": found
        for at, torn in sorted(kills)
        if (found := trial.kill_at(at, torn=torn))
    }
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grow with moments over a model", "train next"])
def test_killed_again_and_again(name, safety_folder, faults):
    trial = begin_trial(name, safety_folder, faults)

    @settings(
        max_examples=2,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(st.integers(1, len(trial.changes)), min_size=2, max_size=4),
        st.booleans(),
    )
    def law(points, torn):
        assert not trial.kill_at(*points, torn=torn)

    law()
