"""How far `check` looks: past windows, rotary scaling and to the end of tables of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny

from regraft import modeling
from regraft.checks import outputs, reach
from regraft.checks.check import check
from regraft.checks.growth import measure_step0
from regraft.core.checkpoint import Checkpoint
from regraft.growth.sizes_to_steps import Growth
from regraft.mixers.remix import Remix

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 70,
}


def source_of(folder: Path, family: str, **keys: Any) -> Checkpoint:
    tiny(family, layers=2, **keys)[1].save_pretrained(folder / "source")
    return Checkpoint.open(folder / "source")


def reach_of(before: Checkpoint, after: Checkpoint | None = None) -> reach.Reach:
    return reach.find_reach(before, after or before, modeling.load_stored(before))


@pytest.mark.parametrize(
    ("family", "keys", "length", "cached"),
    [
        ("llama", {}, 96, 96),
        ("mistral", {"sliding_window": 128}, 2 * 128 + 32, 2 * 128 + 32),
        ("mistral", {"sliding_window": 1000}, 1000 + 256 + 32, 1000 + 256 + 32),
        ("qwen2", {"sliding_window": 128}, 96, 96),
        ("llama", {"max_position_embeddings": 128, "rope_parameters": DYNAMIC}, 160, 127),
        (
            "phi3",
            {"hidden": 72, "original_max_position_embeddings": 70, "rope_parameters": LONG},
            102,
            69,
        ),
        ("gpt2", {"n_positions": 64}, 64, 64),
        ("gpt2", {"n_positions": 1024}, 1024, 1024),
        # Its positions begin behind the padding token's.
        ("roberta", {"max_position_embeddings": 41}, 40, 40),
        ("vit", {}, 0, 0),
    ],
    ids=str,
)
def test_rows_are_as_long_as_what_depends_on_length(
    family: str, keys: dict[str, Any], length: int, cached: int, tmp_path: Path
) -> None:
    found = reach_of(source_of(tmp_path, family, **keys))
    assert (found.length, found.cached) == (length, cached)
    assert (found.limited is None) == (cached == length)


def test_mixers_have_windows_too(tmp_path: Path) -> None:
    before = source_of(tmp_path, "llama")
    found = reach_of(before, Remix(window=70, sinks=3)(before))
    assert found.length == 2 * 73 + 32 and found.rolls == (73,)


def test_a_row_that_costs_too_much_is_cut_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_of(tmp_path, "mistral", sliding_window=128)
    parameters = sum(lazy.size for lazy in before.tensors.values())
    monkeypatch.setattr(reach, "BUDGET_FLOPS", 2 * 2 * parameters * 200.0)
    found = reach_of(before)
    assert 96 < found.length < 200
    assert found.limited and f"{found.length} of 288 tokens" in found.limited
    assert "a window of 128 tokens" in found.limited


def test_a_row_is_decoded_one_by_one_where_a_cache_rolls_over() -> None:
    pieces = outputs.split_row(100, (40,))
    assert sum(pieces) == 100 and pieces[:2] == [33, 3]
    ends = {sum(pieces[:count]) for count in range(len(pieces) + 1)}
    assert {*range(36, 49), *range(84, 101)} <= ends
    assert all(sum(outputs.split_row(length, (1, 9))) == length for length in range(1, 30))


@pytest.mark.parametrize("positions", [2, 3, 30, 64])
def test_short_positions_are_never_overrun(positions: int, tmp_path: Path) -> None:
    before = source_of(tmp_path, "gpt2", n_positions=positions)
    Growth(ffn=60, layers=4, depth_init="stack")(before).save(tmp_path / "out")
    receipts = check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["reached_tokens"] == positions
    assert receipts["greedy_tokens"] == min(24, positions // 2)
    assert measure_step0(tmp_path / "source", tmp_path / "out")["rel_logit_diff"] > 1e-3


def test_a_window_far_out_is_reached(tmp_path: Path) -> None:
    """A window of 128 with 300 tokens was once beyond the rows."""
    kinds = ["full_attention", "sliding_attention"]
    keys = {"use_sliding_window": True, "sliding_window": 128, "layer_types": kinds}
    before = source_of(tmp_path, "qwen2", **keys)
    Growth(ffn=60)(before).save(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text()) | {"sliding_window": 127}
    file.write_text(json.dumps(config))
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text()) | {"files": {}}
    (tmp_path / "out" / "lineage.json").write_text(json.dumps(lineage))
    receipts = check(tmp_path / "source", tmp_path / "out")
    assert {"rel_logit_diff", "config_differs"} <= set(receipts["failed"])
    assert receipts["reached_tokens"] == 2 * 128 + 32
