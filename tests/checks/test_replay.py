"""Doing recorded steps again: what it takes for the same, what it says when it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny
from hypothesis import given
from hypothesis import strategies as st

from regraft.checks import replay
from regraft.checks.check import check
from regraft.core.checkpoint import Checkpoint
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.ligo import Learned
from regraft.mixers.remix import Remix


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    tiny("llama", layers=2)[1].save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    steps=st.integers(1, 6),
)
def test_only_roundings_are_alike(seed: int, dtype: torch.dtype, steps: int) -> None:
    value = torch.randn(40, generator=torch.Generator().manual_seed(seed)).to(dtype)
    place = int(value.abs().argmax())
    other = value.clone()
    # The next number away from zero has the next bits.
    other.view(torch.int32 if dtype == torch.float32 else torch.int16)[place] += steps
    allowed = replay.WIDE_ULPS if dtype == torch.float32 else replay.NARROW_ULPS
    assert replay.is_rounded_alike(value, other) or steps > allowed
    moved = value.clone()
    moved[0] += 1e-3 + 4 * torch.finfo(dtype).eps * moved[0].abs()
    assert not replay.is_rounded_alike(value, moved)
    moved[0] = torch.nan
    assert not replay.is_rounded_alike(value, moved) and replay.is_rounded_alike(moved, moved)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"step": "Train", "arguments": {}}, "Train: training moved the weights"),
        ({"step": "Learned", "arguments": {}}, "Learned: lineage.json keeps no more"),
        ({"step": "Fold", "arguments": {}}, "Fold cannot be done again .*no step 'Fold'"),
        ({"step": "Widen", "arguments": {"breadth": 3}}, "Widen cannot be done again .*breadth"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_step_that_cannot_be_done_again_is_named(
    entry: dict, reason: str, source: Checkpoint
) -> None:
    made, said = replay.replay_steps(source, replace(source, history=(entry,)))
    assert made is None
    assert said is not None
    assert re.match(reason, said), said


def test_another_history_is_no_continuation(source: Checkpoint) -> None:
    grown = Growth(ffn=60)(source)
    assert replay.replay_steps(grown, source)[1] is not None


def test_a_fitted_map_leaves_the_function_to_prove(source: Checkpoint, tmp_path: Path) -> None:
    Learned(hidden=45)(source).save(tmp_path / "out")
    receipts = check(source.origin, tmp_path / "out")
    assert receipts["unequal"] is None and "fitted maps" in str(receipts["not_replayed"])


def test_missing_and_null_keys_say_the_same(source: Checkpoint) -> None:
    config = {key: value for key, value in source.config.items() if key != "mlp_bias"}
    same = replace(source, config={**config, "rope_scaling": None})
    assert replay.find_config_differences(source, same) == []
    other = replace(source, config={**config, "mlp_bias": True})
    assert replay.find_config_differences(source, other) == ["mlp_bias"]


def test_fresh_weights_of_mixers_are_drawn_again(source: Checkpoint, tmp_path: Path) -> None:
    made = Remix(keep="0", inherit="o", seed=3)(source)
    made.save(tmp_path / "out")
    assert check(source.origin, tmp_path / "out")["unequal"] == []
    # Another seed than the lineage has.
    other = replace(Remix(keep="0", inherit="o", seed=4)(source), history=made.history)
    other.save(tmp_path / "other")
    receipts = check(source.origin, tmp_path / "other")
    assert receipts["unequal"] and all(".mixer." in name for name in receipts["unequal"])
