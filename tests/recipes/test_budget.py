"""What a time limit leaves of a recipe's measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.recipes import budget
from regraft.recipes.budget import Budget


def test_without_a_limit_all_is_measured() -> None:
    free = Budget(None)
    assert free.count_windows(16, 7, 1e9) == 16
    assert free.count_sample_tokens(96, 2, [1e-9]) == 96
    assert free.share(0.5) is None and free.notes == []


@given(
    seconds=st.floats(60, 36000),
    wanted=st.integers(2, 64),
    passes=st.integers(1, 9),
    window=st.floats(1e-3, 60),
)
def test_windows_fit_their_share_or_are_the_fewest(
    seconds: float, wanted: int, passes: int, window: float
) -> None:
    limited = Budget(seconds)
    count = limited.count_windows(wanted, passes, window)
    assert count == budget.FEWEST_WINDOWS or count * passes * window <= budget.QUALITY * seconds
    assert count == wanted or (count + 1) * passes * window > budget.QUALITY * seconds
    assert (limited.notes == []) == (count == wanted)


@given(
    seconds=st.floats(60, 36000),
    wanted=st.integers(16, 200),
    prompts=st.integers(0, 4),
    speeds=st.lists(st.floats(0.01, 1000), max_size=2),
)
def test_samples_fit_their_share_or_are_the_shortest(
    seconds: float, wanted: int, prompts: int, speeds: list[float]
) -> None:
    limited = Budget(seconds)
    count = limited.count_sample_tokens(wanted, prompts, speeds)
    taken = count * prompts * sum(1 / speed for speed in speeds)
    assert count == budget.FEWEST_TOKENS or taken <= budget.SAMPLES * seconds
    assert (limited.notes == []) == (count == wanted)


def test_half_of_the_minutes_are_left_for_the_start_and_training() -> None:
    spent = budget.QUALITY + budget.SPEED + budget.SAMPLES + budget.MARGIN
    assert 1 - spent >= 0.5 and pytest.approx(0.1) == budget.CALIBRATION
