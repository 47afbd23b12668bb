"""What a person sees of a training run: speed, share of the machine's peak, time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..io.files import read_json_lines
from ..progress import Ticker
from .metrics import FILE, MetricsRow
from .records import StageSummary, StepRow, Throughput

if TYPE_CHECKING:
    from .divergence import LossSpikeConfig
    from .stage import Stage

RECENT = 20  # steps over which the displayed speed is averaged
END_SHARE = 0.05  # a stage's first and last loss are means over this share of its steps


class RunWatchers(TypedDict):
    """The fields of a `loop.Run` that watch it."""

    progress: Callable[[Stage, int, int, Any], None]  # called with the row of each step
    track: Callable[[Any], None]  # called with each row of metrics.jsonl
    spike: LossSpikeConfig  # when to stop because of the loss


@dataclass(frozen=True)
class MonitorConfig:
    """How a run is watched.

    Attributes:
        track: trackers, such as `wandb,tensorboard`.
        spike_factor: how many times its running median a loss may be, see
            `divergence.LossSpikeConfig`; 0 to never stop.
    """

    track: str | None = None
    spike_factor: float = 1.5

    @contextmanager
    def monitor(self, out: Path, ticker: Ticker, facts: Mapping[str, Any]) -> Iterator[RunWatchers]:
        """Inside, the fields of a loop.Run that watch it.

        RegraftError for unknown or missing trackers and for a `spike_factor` of 1 or less.

        Args:
            out: the run's output folder.
            ticker: shows loss, speed and time left.
            facts: what trackers store as the run's configuration.
        """
        # Reading summaries needs neither torch nor the trackers, so these are imported here.
        from . import trackers
        from .divergence import LossSpikeConfig

        meter, spike = Meter(ticker), LossSpikeConfig(self.spike_factor)
        with trackers.open_trackers(self.track, out, dict(facts)) as track:
            yield {"progress": meter, "track": track, "spike": spike}


DEFAULT_MONITORING = MonitorConfig()


class Meter:
    """Shows loss, speed and time left of a stage on a ticker, from the rows of the last steps."""

    def __init__(self, ticker: Ticker):
        self.ticker, self.rows = ticker, deque[StepRow](maxlen=RECENT)

    def __call__(self, stage: Stage, step: int, steps: int, row: StepRow) -> None:
        """Show the state after step `step` of `steps`."""
        if self.rows and self.rows[-1]["stage"] != row["stage"]:
            self.rows.clear()
        self.rows.append(row)
        seconds, speed = recent_speed(list(self.rows), stage.unit)
        note = f"{stage.kind}: loss {row['loss']:.4f}, {row['tokens']:,} {stage.unit}, {speed}"
        self.ticker.update(step / steps, note, seconds * (steps - step))


def recent_speed(rows: Sequence[StepRow], unit: str) -> tuple[float, str]:
    """(seconds a step, the speed in words) over rows of one stage.

    Args:
        rows: the last steps, oldest first. Time is measured from the end of the oldest one.
        unit: what the stage counts, such as `tokens`.
    """
    first, last = rows[0], rows[-1]
    # The first step of a stage has none before it to measure from: its own FLOPs and FLOP/s.
    if last["seconds"] <= first["seconds"]:
        seconds = last["flops"] / last["step"] / max(last["flops_per_second"], 1e-9)
        return seconds, format_speed(cast(Throughput, last), unit)

    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    flops_per_second = (last["flops"] - first["flops"]) / seconds
    # The machine's peak is not in the rows, only the last step's share of it. The share scales
    # with the FLOP/s.
    ratio = flops_per_second / max(last["flops_per_second"], 1e-9)
    speed: Throughput = {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / seconds,
        "flops_per_second": last["flops_per_second"] * ratio,
        "peak_share": last["peak_share"] * ratio,
    }
    return seconds / max(steps, 1), format_speed(speed, unit)


def format_speed(speed: Throughput | StepRow, unit: str) -> str:
    """Such as `850 tokens/s, 41.2 GFLOP/s, 63% of the measured peak`."""
    rate, prefix = speed["flops_per_second"] / 1e9, "G"
    if rate >= 1e3:
        rate, prefix = rate / 1e3, "T"
    share = f"{speed['peak_share']:.0%} of the measured peak"
    return f"{speed['tokens_per_second']:,.0f} {unit}/s, {rate:,.1f} {prefix}FLOP/s, {share}"


def summarize_stages(out: str | Path) -> list[StageSummary]:
    """Summarize every stage in `out/metrics.jsonl`, in order.

    Work between the steps, such as held-out evaluation and saving, is not in the rows and so not
    in the summaries.
    """
    stages: dict[int, list[StepRow]] = {}
    for row in read_json_lines(Path(out) / FILE, MetricsRow):
        # Rows on held-out data have `eval_loss` instead.
        if "loss" in row:
            stages.setdefault(row["stage"], []).append(cast(StepRow, row))
    return [summarize_steps(index, rows) for index, rows in sorted(stages.items())]


def summarize_steps(number: int, rows: Sequence[StepRow]) -> StageSummary:
    """Summarize the steps of one stage (or layer).

    Args:
        number: number of the stage or layer.
        rows: its steps in order. `tokens` and `seconds` count from its start.
    """
    few, last = max(1, round(END_SHARE * len(rows))), rows[-1]

    # Rows of older runs have no share of the peak.
    ends = [0.0, *(row["seconds"] for row in rows)]
    measured = [
        (end - start, row["peak_share"])
        for start, end, row in zip(ends, ends[1:], rows, strict=False)
        if "peak_share" in row
    ]
    total = sum(seconds for seconds, _ in measured)

    return {
        "stage": number,
        "kind": last["kind"],
        "tokens": last["tokens"],
        "steps": last["step"],
        "first_loss": sum(row["loss"] for row in rows[:few]) / few,
        "last_loss": sum(row["loss"] for row in rows[-few:]) / few,
        "tokens_per_second": last["tokens"] / last["seconds"] if last["seconds"] else None,
        "peak_share": (
            sum(seconds * share for seconds, share in measured) / total if total else None
        ),
        "seconds": last["seconds"],
    }
