"""Watching a run: speed and its share of the peak, losses per stage, trackers, and stopping one
that goes astray.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.tiny import SPECIAL, byte_tokenizer, tiny, write_text
from helpers.training import Killed, go, stage, timeless

from regraft.errors import RegraftError
from regraft.io import signals as stops
from regraft.progress import Ticker, format_seconds
from regraft.train import loop, monitor, signals, throughput, trackers
from regraft.train.divergence import LossSpikeConfig, LossTrend, check_divergence


def test_every_row_tells_its_speed_and_the_summary_its_stages(tmp_path: Path) -> None:
    rows, _, _ = go(tmp_path, [stage("next", 40), stage("next", 30)])
    for row in rows:
        assert row["flops_per_second"] / row["tokens_per_second"] == pytest.approx(
            row["flops"] / row["tokens"], rel=0.01
        )
        assert row["flops_per_second"] / row["peak_share"] == pytest.approx(
            throughput.measure_peak_flops(torch.device("cpu"), False), rel=0.01
        )
    first, second = monitor.summarize_stages(tmp_path)
    losses = [row["loss"] for row in rows[:40]]
    assert (first["tokens"], first["steps"], second["tokens"]) == (40 * 48, 40, 30 * 48)
    assert first["first_loss"] == pytest.approx(sum(losses[:2]) / 2)
    assert first["last_loss"] == pytest.approx(sum(losses[-2:]) / 2)
    assert first["tokens_per_second"] == pytest.approx(40 * 48 / first["seconds"])
    assert (
        min(row["peak_share"] for row in rows)
        <= first["peak_share"]
        <= max(row["peak_share"] for row in rows)
    )


def test_the_peak_is_that_of_the_fastest_product_and_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock of the test's own: products take 4, 2 and 3 ms, then the time for measuring is
    over.
    """
    begin, products, readings = 100.0, (0.004, 0.002, 0.003), [0.0]
    now = begin
    for seconds in products:
        readings += [
            now - begin,
            now - begin,
            now - begin + seconds,
        ]  # the loop's condition, tick, end
        now += seconds
    readings.append(throughput.MEASURE_SECONDS)
    clock = iter(begin + reading for reading in readings)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    throughput.measure_matmul_flops.cache_clear()
    try:
        found = throughput.measure_peak_flops(torch.device("cpu"), False)
        again = throughput.measure_peak_flops(torch.device("cpu"), False)  # the clock has run out
    finally:
        throughput.measure_matmul_flops.cache_clear()
    assert found == again == pytest.approx(2 * 1024**3 / 0.002)


def test_the_display_says_speed_and_time_left() -> None:
    told: list[Any] = []
    ticker: Any = SimpleNamespace(update=lambda *words: told.append(words))
    meter = monitor.Meter(ticker)
    part = stage("next", 100)
    for step in range(
        1, 31
    ):  # a first step of 5 s, then 0.5 s each, at 48 tokens and 10 GFLOP a step
        seconds = 5 + 0.5 * (step - 1)
        speeds = {"tokens_per_second": 96.0, "flops_per_second": 2e10, "peak_share": 0.25}
        if step == 1:
            speeds = {"tokens_per_second": 9.6, "flops_per_second": 2e9, "peak_share": 0.025}
        row = {
            "stage": 0,
            "step": step,
            "loss": 2.0,
            "tokens": 48 * step,
            "flops": 10**10 * step,
            "seconds": seconds,
        }
        meter(part, step, 100, row | speeds)
    assert told[0] == (
        0.01,
        "next: loss 2.0000, 48 tokens, 10 tokens/s, 2.0 GFLOP/s, 2% of the measured peak",
        495.0,
    )
    words = "next: loss 2.0000, 1,440 tokens, 96 tokens/s, 20.0 GFLOP/s, 25% of the measured peak"
    assert told[-1] == (0.3, words, pytest.approx(35.0))
    told.clear()
    meter(
        part, 1, 100, row | speeds | {"stage": 1, "step": 1, "flops": 10**10}
    )  # the next stage has its own speed
    assert told[0][2] == pytest.approx(49.5)
    line = Ticker(stream=io.StringIO())
    line.update(0.5, "words", 65.0)
    assert "about 1:05 to go here" in line.format_line()
    assert (format_seconds(7300), format_seconds(3 * 86400)) == ("2.0 hours", "3.0 days")


def steady(count: int, level: float = 3.0) -> list[float]:
    return [level + 0.3 * (index % 7 - 3) / 3 for index in range(count)]


def seen(losses: list[float], jump: LossSpikeConfig) -> tuple[int, LossTrend]:
    """(step at which the run is stopped or 0, what is known then)."""
    trend = LossTrend()
    for step, loss in enumerate(losses, 1):
        trend = LossTrend(
            **json.loads(json.dumps(vars(trend)))
        )  # its state survives a restart at any step
        if trend.observe(loss, step, jump):
            return step, trend
    return 0, trend


def test_a_jump_is_a_loss_that_stays_up() -> None:
    jump = LossSpikeConfig()
    assert seen(steady(300) + [7.5] * 20, jump)[0] == 310
    assert seen(steady(300) + [7.5] * 9 + steady(50) + [7.5] * 9, jump)[0] == 0  # spikes that pass
    assert seen(steady(300) + steady(300, 4.4), jump)[0] == 0  # harder text
    assert (
        seen([1e-4] * 20 + [0.3] * 100, jump)[0] == 0
    )  # an exact start that learns: less than the margin
    assert seen([11.0 - 0.05 * step for step in range(150)], jump)[0] == 0
    assert seen(steady(300) + [7.5] * 50, LossSpikeConfig(0))[0] == 0
    assert seen([9.0] * 7 + [30.0] * 40, jump)[0] == 0  # too few to know what is usual
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0)).exp()
    assert seen(noise.tolist(), jump)[0] == 0
    with pytest.raises(RegraftError, match="spike_factor is 0.9: give a multiple"):
        LossSpikeConfig(0.9)


def test_the_last_good_checkpoint_is_from_before_the_jump() -> None:
    part, trend, places = (
        stage("next", 400),
        LossTrend(),
        [(0, 90, Path("a")), (1, 299, Path("b")), (1, 300, Path("c"))],
    )
    losses = steady(300) + [7.5] * 20
    with pytest.raises(
        RegraftError,
        match=r"far above the usual 3 since step 301; last good checkpoint: b \(stage 1, ",
    ):
        for step, loss in enumerate(losses, 1):
            check_divergence(trend, LossSpikeConfig(), part, (1, step), loss, 1.0, lambda: places)
    for value, norm, words in [
        (float("nan"), 1.0, " is nan"),
        (2.0, float("inf"), "'s gradient is inf"),
    ]:
        with pytest.raises(
            RegraftError,
            match=rf"'next'{words} at step 91; last good checkpoint: a \(stage 0, step 90",
        ):
            check_divergence(
                LossTrend(), LossSpikeConfig(), part, (1, 91), value, norm, lambda: places[:1]
            )
    with pytest.raises(RegraftError, match="no good checkpoint yet: lower its learning rates"):
        check_divergence(LossTrend(), LossSpikeConfig(), part, (0, 1), float("nan"), 1.0, list)


def test_a_run_that_jumps_stops_and_keeps_what_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = loop.train_step, 0

    def broken(*given: Any) -> tuple[float, int]:
        nonlocal count
        count += 1
        value, flops = original(*given)
        return (value if count <= 20 else value + 30.0), flops

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(
        RegraftError,
        match=r"since step 21; last good checkpoint: .*stage-0-step-19 .*--spike-factor 0",
    ):
        go(tmp_path, [stage("next", 60)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 29
    monkeypatch.setattr(loop, "train_step", original)
    again, model, _ = go(tmp_path, [stage("next", 60)])
    whole, other, _ = go(tmp_path / "whole", [stage("next", 60)])
    assert timeless(again) == timeless(whole)


class Fake:
    """The interface of wandb and of trackio, written down as it was called."""

    def __init__(self, fails_at: int = -1) -> None:
        self.began: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.ends: list[dict[str, Any]] = []
        self.fails_at = fails_at

    def init(self, **options: Any) -> Fake:
        self.began.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if len(self.rows) == self.fails_at:
            raise OSError("no\nnetwork")
        self.rows.append((step, values))

    def finish(self, **options: Any) -> None:
        self.ends.append(options)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_SILENT", raising=False)

    def run(stop_after: int | None) -> None:
        with trackers.open_trackers(name, tmp_path, {"seed": 3}) as track:
            go(
                tmp_path,
                [stage("next", 5), stage("next", 3)],
                stop_after,
                track=track,
                heldout=None,
            )

    with pytest.raises(Killed):
        run(4)
    run(None)
    steps = [step for step, _ in fake.rows]
    assert (
        steps == list(range(1, 9)) and fake.rows[0][1]["loss"] > 0 and "step" not in fake.rows[0][1]
    )
    first, second = fake.began
    assert (
        first == second and first["name"].startswith(tmp_path.name) and first["resume"] == "allow"
    )
    assert first["config"] == {"seed": 3}
    assert fake.ends == ([{"exit_code": 1}, {"exit_code": 0}] if name == "wandb" else [{}, {}])


def test_held_out_rows_have_the_place_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with trackers.open_trackers("trackio", tmp_path, {}) as track:
        for index in (0, 1):
            track({"stage": index, "step": 0, "eval_loss": 2.0})
            for step in (1, 2):
                track({"stage": index, "step": step, "loss": 1.0})
            track({"stage": index, "step": 2, "eval_loss": 1.5})
    assert [(step, "loss" in row) for step, row in fake.rows] == [
        (0, False), (1, True), (2, True), (2, False), (2, False), (3, True), (4, True), (4, False),
    ]  # fmt: skip


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(fails_at=2)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with trackers.open_trackers("trackio", tmp_path, {}) as track:
        rows, _, _ = go(tmp_path, [stage("next", 5)], track=track)
    assert len(rows) == 5 and len(fake.rows) == 2
    said = capsys.readouterr().err
    assert said.count("trackio failed") == 1 and "(no network)" in said


def test_tensorboard_files_hold_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed), trackers.open_trackers("tensorboard", tmp_path, {}) as track:
        go(tmp_path, [stage("next", 6)], 3, track=track)
    with trackers.open_trackers("tensorboard", tmp_path, {}) as track:
        rows, _, _ = go(tmp_path, [stage("next", 6)], track=track)
    events = EventAccumulator(str(tmp_path / trackers.FOLDER))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == 6
    assert told == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=1e-5)


def test_the_verb_tracks_stops_and_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tiny("qwen2", vocab=len(SPECIAL) + 256)[1].save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    command = ["train", tmp_path / "model", tmp_path / "out", "--data", tmp_path / "text.txt", "--stage", "next",
               "--tokens", 640, "--length", 64, "--batch", 2]  # fmt: skip
    assert re.search(
        "no tracker is called 'wandboard'", refused(capsys, *command, "--track", "wandboard")
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert re.search("pip install wandb", refused(capsys, *command, "--track", "trackio,wandb"))
    assert re.search("spike_factor is 0.5", refused(capsys, *command, "--spike-factor", "0.5"))
    table = as_json(capsys, *command, "--track", "trackio")
    assert len(fake.rows) == table["summary"][0]["steps"] == 5
    assert fake.began[0]["config"]["stages"][0]["kind"] == "next"
    command[2] = tmp_path / "astray"
    assert re.search(
        "loss of stage 'next'.* is (nan|inf).* good checkpoint",
        refused(capsys, *command, "--lr-body", "1e30"),
    )


def test_a_signal_that_is_repeated_at_once_is_one(monkeypatch):
    raised = []
    monkeypatch.setattr(signals.signal, "raise_signal", raised.append)
    with signals.StopSignals() as stopping:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.is_requested and not raised
        monkeypatch.setattr(stops, "AGAIN", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
