"""Counts, sizes and context lengths as people write them, and near matches for misspelt words."""

from __future__ import annotations

import pytest

from regraft.errors import RegraftError, suggest
from regraft.io.units import parse_lengths, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4GB", 4 * 10**9),
        ("80GB", 80 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5 MB", 1_500_000),
        ("2tb", 2 * 10**12),
        (".5G", 500_000_000),
        ("1B", 10**9),
        ("1.5B", 1_500_000_000),
        ("64k", 64_000),
        ("1e6", 10**6),
        (" 200000 ", 200_000),
        ("0", 0),
    ],
)
def test_numbers(text: str, number: int) -> None:
    assert parse_number(text, "tokens") == number


@pytest.mark.parametrize("text", ["much", "", "GB", "-1GB", "1 2", "1.5.2M", "4XB", "nan"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(RegraftError, match=f"^memory is '{text}': give a number such as "):
        parse_number(text, "memory")


def test_1k_is_1024_for_context_lengths_only() -> None:
    assert (parse_number("1k", "tokens"), parse_lengths("1k")) == (1000, [1024])


def test_near_matches() -> None:
    known = ["plan", "train", "grow"]
    assert suggest("plann", known) == "did you mean plan? "
    assert suggest("piqb", ["piqa", "piqo", "arc"], 2) == "did you mean piqo or piqa? "
    assert suggest("zzz", known) == ""
