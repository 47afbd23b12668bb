"""The signature grammar, expansions and broadcasting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core import axes
from regraft.errors import RegraftError

SIZES = {"hidden": 36, "kv": 3, "group": 2, "dim": 4, "ffn": 10, "vocab": 97}
MAKERS = {
    "pad": lambda old, by: axes.pad(old, old + by),
    "place": lambda old, by: axes.place(old, old + by, torch.randperm(old + by)[:old]),
    "repeat": axes.repeat,
    "tile": lambda old, by: axes.tile(old, old * by),
    "duplicate": lambda old, by: axes.duplicate(old, old + by, seed=by),
    "split": lambda old, by: axes.split(old, old + by, seed=by),
    "rounds": lambda old, by: axes.rounds(old, old + by),
}
EVEN = {"pad": lambda by: 1, "place": lambda by: 1, "repeat": lambda by: by, "tile": lambda by: by}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.integers(1, 7), st.integers(1, 12))
def test_reading_undoes_embedding(name: str, old: int, by: int) -> None:
    expansion = MAKERS[name](old, by)
    assert torch.allclose(
        expansion.read_matrix @ expansion.write_matrix, torch.eye(old, dtype=torch.float64)
    )
    if name in EVEN:
        assert expansion.copies == EVEN[name](by)
        assert torch.equal(
            expansion.write_matrix.T @ expansion.write_matrix,
            expansion.copies * torch.eye(old, dtype=torch.float64),
        )


def test_identity_is_the_neutral_expansion() -> None:
    assert (
        axes.identity(5).is_identity and axes.identity(5).in_place and axes.identity(5).copies == 1
    )


def test_no_single_count_when_copies_are_not_balanced() -> None:
    assert axes.duplicate(4, 6).copies is None and axes.rounds(4, 9).copies == 2


@pytest.mark.parametrize(
    ("text", "stored", "shape"),
    [
        ("hidden -> kv group dim", "out in", (24, 36)),
        ("hidden -> kv group dim", "in out", (36, 24)),
        ("hidden -> kv dim + kv dim + kv dim", "in out", (36, 36)),
        ("hidden -> kv three dim", "out in", (36, 36)),
        ("-> kv group", "out in", (6,)),
        ("gain hidden", "out in", (36,)),
        ("1+gain dim", "out in", (4,)),
        ("kv group dim dim", "out in", (6, 4, 4)),
    ],
)
def test_shapes_of_signatures(text: str, stored: str, shape: tuple[int, ...]) -> None:
    assert axes.parse_signature(text).shape(SIZES, stored) == shape


def test_unit_gains_are_told_apart() -> None:
    assert (
        axes.parse_signature("1+gain hidden").unit and not axes.parse_signature("gain hidden").unit
    )


@pytest.mark.parametrize("text", ["hidden -> heads", "gain width", "hidden -> ffn + experts"])
def test_unknown_axis_quotes_the_signature(text: str) -> None:
    with pytest.raises(RegraftError, match="unknown axis") as caught:
        axes.parse_signature(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["", "hidden ->", "gain hidden -> ffn", "-> ffn +"])
def test_signature_without_output_is_refused(text: str) -> None:
    with pytest.raises(RegraftError, match="names no output"):
        axes.parse_signature(text)


def test_broadcast_repeats_each_head_for_its_queries() -> None:
    value = torch.arange(12.0).reshape(12, 1)  # 3 heads of 4
    wide = axes.broadcast_axes(value, ("kv", "dim"), ("kv", "group", "dim"), SIZES)
    expected = value.view(3, 4, 1).repeat_interleave(2, 0).reshape(24, 1)
    assert torch.equal(wide, expected)
    matrix = torch.kron(axes.repeat(3, 2).write_matrix.float(), torch.eye(4))
    assert torch.equal(wide, matrix @ value)


def test_broadcast_refuses_to_lose_or_reorder_axes() -> None:
    with pytest.raises(RegraftError, match=r"axes \['group'\] have nowhere to go"):
        axes.broadcast_axes(torch.zeros(24, 2), ("kv", "group", "dim"), ("kv", "dim"), SIZES)
    with pytest.raises(RegraftError, match="cannot inherit 'dim kv' from 'kv dim'"):
        axes.broadcast_axes(torch.zeros(12, 2), ("kv", "dim"), ("dim", "kv"), SIZES)


@pytest.mark.parametrize(
    "make", [lambda: axes.pad(5, 3), lambda: axes.repeat(5, 0), lambda: axes.tile(5, 12)]
)
def test_expansions_refuse_what_they_cannot_do(make) -> None:
    with pytest.raises(RegraftError, match="5|0|10, 15"):
        make()
