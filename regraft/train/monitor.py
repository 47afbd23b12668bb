"""What a person sees of a training run: speed, share of the machine's peak, time left, and every stage's outcome."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import read_json_lines
from ..progress import Ticker

if TYPE_CHECKING:
    from .stage import Stage

RECENT = 20  # steps over which speed is told
END_SHARE = 0.05  # share of a stage's steps that its first and its last loss are the mean of
Row = dict[str, Any]


@dataclass(frozen=True)
class MonitorConfig:
    """How a run is watched. `track`: trackers, such as `wandb,tensorboard`; `jump`: how many times the usual loss is
    too much, see `uptrain.divergence.Jump`, 0 for no watch.
    """

    track: str | None = None
    spike_factor: float = 1.5

    @contextmanager
    def monitor(
        self, out: Path, ticker: Ticker, facts: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Inside, the fields of a loop.Run that watch it; `facts` are what trackers note of the run.

        RegraftError for trackers that are unknown or not installed, and for a jump of 1 or less.
        """
        from . import trackers
        from .divergence import LossSpikeConfig

        meter, jump = Meter(ticker), LossSpikeConfig(self.spike_factor)
        with trackers.open_trackers(self.track, out, dict(facts)) as track:
            yield {"progress": meter, "track": track, "jump": jump}


DEFAULT_MONITORING = MonitorConfig()


class Meter:
    """Tells a ticker the loss, the speed and the time left of a stage, from the rows of the last steps."""

    def __init__(self, ticker: Ticker):
        self.ticker, self.rows = ticker, deque[Row](maxlen=RECENT)

    def __call__(self, stage: Stage, step: int, steps: int, row: Row) -> None:
        """After each step of `steps`."""
        if self.rows and self.rows[-1]["stage"] != row["stage"]:
            self.rows.clear()
        self.rows.append(row)
        each, words = recent_speed(list(self.rows), stage.unit)
        note = f"{stage.kind}: loss {row['loss']:.4f}, {row['tokens']:,} {stage.unit}, {words}"
        self.ticker.update(step / steps, note, each * (steps - step))


def recent_speed(rows: Sequence[Row], unit: str) -> tuple[float, str]:
    """(seconds of a step, the speed in words) over the last rows of a stage, measured from the first of them on."""
    first, last = rows[0], rows[-1]
    speeds = {key: last[key] for key in ("tokens_per_second", "flops_per_second", "peak_share")}
    steps, seconds = 1, last["flops"] / last["step"] / max(last["flops_per_second"], 1e-9)
    if last["seconds"] > first["seconds"]:
        steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
        faster = (last["flops"] - first["flops"]) / seconds / max(last["flops_per_second"], 1e-9)
        speeds = {key: value * faster for key, value in speeds.items()}
        speeds["tokens_per_second"] = (last["tokens"] - first["tokens"]) / seconds
    return seconds / max(steps, 1), format_speed(speeds, unit)


def format_speed(speeds: Mapping[str, float], unit: str) -> str:
    """Such as `850 tokens/s, 41.2 GFLOP/s, 63% of the measured peak`."""
    rate, unit_of = speeds["flops_per_second"], "G"
    if rate >= 1e12:
        rate, unit_of = rate / 1e3, "T"
    share = f"{speeds['peak_share']:.0%} of the measured peak"
    return (
        f"{speeds['tokens_per_second']:,.0f} {unit}/s, {rate / 1e9:,.1f} {unit_of}FLOP/s, {share}"
    )


def summarize_stages(out: str | Path) -> list[Row]:
    """A row for every stage in `out/metrics.jsonl`: tokens (or images), loss at its start and end (means of the first
    and last 5 % of its steps), tokens a second, share of the measured peak, seconds. Time of other work is left out.
    """
    stages: dict[int, list[Row]] = {}
    for row in read_json_lines(Path(out) / "metrics.jsonl"):
        if "loss" in row:
            stages.setdefault(row["stage"], []).append(row)
    return [{"stage": index, **summarize_stage(rows)} for index, rows in sorted(stages.items())]


def summarize_stage(rows: Sequence[Row]) -> Row:
    """The summary of one stage's rows."""
    few, last = max(1, round(END_SHARE * len(rows))), rows[-1]
    marks = [0.0, *(row["seconds"] for row in rows)]
    spans = [
        (after - before, row) for before, after, row in zip(marks, marks[1:], rows, strict=False)
    ]
    known = [(span, row["peak_share"]) for span, row in spans if "peak_share" in row]
    total = sum(span for span, _ in known)
    return {
        "kind": last["kind"],
        "tokens": last["tokens"],
        "steps": last["step"],
        "first_loss": sum(row["loss"] for row in rows[:few]) / few,
        "last_loss": sum(row["loss"] for row in rows[-few:]) / few,
        "tokens_per_second": last["tokens"] / last["seconds"] if last["seconds"] else None,
        "peak_share": sum(span * share for span, share in known) / total if total else None,
        "seconds": last["seconds"],
    }
