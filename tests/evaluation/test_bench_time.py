"""Which speeds a time limit leaves out, and what stands for them."""

from __future__ import annotations

from typing import Any

import pytest

from regraft.evaluation import bench, bench_time
from regraft.evaluation.bench_time import TimeLimit, extrapolate
from regraft.evaluation.rows import BenchRow

BASE, SLOPE, READ, POWER = 0.02, 1e-6, 1e-4, 1.3  # seconds: a + b L, c L^e


def row(length: int, decode: bool = True, prefill: bool = True, batch: int = 2) -> BenchRow:
    """A row of a machine that follows the laws that are assumed."""
    empty: dict[str, Any] = dict.fromkeys(
        ("state_bytes", "converted_bytes", "kept_bytes", "peak_bytes", "load_bytes"), 0
    )
    return {
        **empty,  # type: ignore[typeddict-item]
        "length": length,
        "batch": batch,
        "decode_tok_s": batch / (BASE + SLOPE * length) if decode else None,
        "prefill_tok_s": batch * length / (READ * length**POWER) if prefill else None,
        "extrapolated": [],
    }


@pytest.mark.parametrize("missing", ["decode", "prefill", "both"])
def test_a_machine_that_follows_the_laws_is_extrapolated_exactly(missing: str) -> None:
    shorter = [row(512), row(1024), row(4096)]
    known = row(65536, decode=missing == "prefill", prefill=missing == "decode")
    found, expected = extrapolate(known, shorter), row(65536)
    for key in ("decode_tok_s", "prefill_tok_s"):
        assert found[key] == pytest.approx(expected[key])  # type: ignore[literal-required]
        was_missing = missing in (key.split("_")[0], "both")
        assert (key in found["extrapolated"]) == was_missing


def test_one_context_says_nothing_of_another() -> None:
    found = extrapolate(row(4096, decode=False, prefill=False), [row(1024)])
    assert found["decode_tok_s"] is None and found["prefill_tok_s"] is None
    assert found["extrapolated"] == []


def test_nothing_is_extrapolated_from_extrapolated_speeds() -> None:
    second = row(1024) | {"extrapolated": ["decode_tok_s", "prefill_tok_s"]}
    found = extrapolate(row(4096, decode=False, prefill=False), [row(512), second])  # type: ignore[list-item]
    assert found["extrapolated"] == []


@pytest.mark.parametrize(
    ("seconds", "level"), [(None, "all"), (10_000.0, "all"), (40.0, "decode"), (2.0, "nothing")]
)
def test_what_fits_is_measured(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, level: str
) -> None:
    """At 65,536 tokens two models read for 363 s and decode for 2.9 s."""
    now = [0.0]
    monkeypatch.setattr(bench_time.time, "monotonic", lambda: now[0])
    limit = TimeLimit(seconds, steps=16, models=2)
    assert limit.choose({"teacher": [], "student": []}, 1024, 3) == "all"
    now[0] = 1.0
    rows = {name: [row(1024, batch=1), row(4096, batch=1)] for name in ("teacher", "student")}
    assert limit.choose(rows, 65536, 1) == level


def test_a_limited_bench_measures_short_contexts_and_marks_the_others(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.tiny import tiny

    tiny("llama", layers=2)[1].save_pretrained(tmp_path)
    asked: list[tuple[int, bool]] = []

    def run(path: str, length: int, steps: int, batch: int, prefill: bool, dtype: str) -> BenchRow:
        assert dtype == "float32"
        asked.append((length, prefill))
        return row(length, prefill=prefill, batch=batch)

    monkeypatch.setattr(bench, "run_worker", run)
    rows = bench.bench({"teacher": str(tmp_path)}, [65536, 64, 128, 32768], 4, seconds=1.0)
    assert asked == [(64, True), (128, True), (32768, False), (65536, False)]
    assert [one["extrapolated"] for one in rows["teacher"]] == [
        [],
        [],
        ["prefill_tok_s"],
        ["prefill_tok_s"],
    ]
