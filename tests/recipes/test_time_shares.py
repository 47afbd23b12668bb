"""What a time limit leaves of a recipe's measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.recipes import time_shares
from regraft.recipes.time_shares import TimeShares


def test_without_a_limit_all_is_measured() -> None:
    free = TimeShares(None)
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
    limited = TimeShares(seconds)
    count = limited.count_windows(wanted, passes, window)
    assert (
        count == time_shares.FEWEST_WINDOWS
        or count * passes * window <= time_shares.QUALITY * seconds
    )
    assert count == wanted or (count + 1) * passes * window > time_shares.QUALITY * seconds
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
    limited = TimeShares(seconds)
    count = limited.count_sample_tokens(wanted, prompts, speeds)
    taken = count * prompts * sum(1 / speed for speed in speeds)
    assert count == time_shares.FEWEST_TOKENS or taken <= time_shares.SAMPLES * seconds
    assert (limited.notes == []) == (count == wanted)


def test_half_of_the_minutes_are_left_for_the_start_and_training() -> None:
    spent = time_shares.QUALITY + time_shares.SPEED + time_shares.SAMPLES + time_shares.MARGIN
    assert 1 - spent >= 0.5 and pytest.approx(0.1) == time_shares.CALIBRATION
