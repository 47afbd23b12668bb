"""What a long run is doing, on standard error: a live bar on a terminal, else a line at least every
few seconds.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

# Called with the share of a piece of work that is done, 0 to 1, and a message.
ProgressCallback = Callable[[float, str], None]

BEAT = 8.0  # seconds between lines when there is no terminal
QUIET = (
    2.0  # nothing is said in the first seconds: wrong input then gives its one line and no other
)


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_main_process() -> bool:
    """Whether this process speaks for all: the first of a torchrun, or the only one."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def format_seconds(seconds: float) -> str:
    """Seconds as m:ss, from two hours on as `h hours`, from two days on as `d days`."""
    for size, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{int(max(seconds, 0)) // 60}:{int(max(seconds, 0)) % 60:02d}"


class Ticker:
    """Says the current phase, how far it is, and the time used and left; never silent for longer
    than `BEAT` seconds.

    `budget`: seconds for everything, or None; `spent`: seconds used by earlier, interrupted runs;
    `each_beat` is called twice a second from a thread of its own. Use as a context.
    """

    def __init__(
        self,
        budget: float | None = None,
        spent: float = 0.0,
        stream: TextIO | None = None,
        each_beat: Callable[[], None] = lambda: None,
    ):
        self.stream = stream or (sys.stderr if is_main_process() else io.StringIO())
        self.budget, self.spent, self.begin = budget, spent, time.monotonic()
        self.phase, self.note, self.fraction, self.phase_begin = (
            "starting",
            "",
            None,
            time.monotonic(),
        )
        self.last, self.coming = self.begin - BEAT, None
        self.each_beat = each_beat
        self.stop = threading.Event()
        self.bar = build_bar(self.stream) if self.stream.isatty() else None
        self.thread = threading.Thread(target=self.run_heartbeat, daemon=True)

    fraction: float | None
    coming: float | None

    def __enter__(self) -> Ticker:
        if self.bar is not None:
            self.task = self.bar.add_task(self.phase, total=1.0, words="")
            self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.bar is not None:
            self.bar.stop()

    def seconds_used(self) -> float:
        """Seconds spent so far, earlier runs included."""
        return self.spent + time.monotonic() - self.begin

    def seconds_left(self) -> float | None:
        """Seconds of the budget that remain, None without a budget."""
        return None if self.budget is None else self.budget - self.seconds_used()

    def start(self, phase: str) -> None:
        """Begin a phase and say so at once."""
        self.phase, self.note, self.fraction, self.phase_begin = phase, "", None, time.monotonic()
        self.coming = None
        self.show(force=True)

    def update(
        self, fraction: float | None = None, note: str = "", coming: float | None = None
    ) -> None:
        """How far the phase is, 0 to 1, a few words, and the seconds it still takes where they are
        known.
        """
        self.fraction, self.note, self.coming = fraction, note, coming
        self.show()

    def format_line(self) -> str:
        """The line: share done, note, time used, time left of the phase or of the budget."""
        here = time.monotonic() - self.phase_begin
        parts = [f"{self.fraction:.0%}"] if self.fraction is not None else []
        parts += [self.note] if self.note else []
        coming = self.coming
        if coming is None and self.fraction and self.fraction > 0.02:
            coming = here / self.fraction - here
        if coming is not None:
            parts.append(f"about {format_seconds(coming)} to go here")
        left = self.seconds_left()
        parts.append(f"{format_seconds(self.seconds_used())} used")
        if left is not None:
            parts.append(f"{format_seconds(left)} of {format_seconds(self.budget or 0)} left")
        return " · ".join(parts)

    def show(self, force: bool = False) -> None:
        """Draw the bar, or print a line if one is due."""
        if self.bar is not None:
            self.bar.update(
                self.task,
                description=self.phase,
                completed=self.fraction or 0.0,
                words=self.format_line(),
            )
        elif time.monotonic() - self.begin > QUIET and (
            force or time.monotonic() - self.last >= BEAT
        ):
            self.last = time.monotonic()
            print(f"regraft: {self.phase} · {self.format_line()}", file=self.stream, flush=True)

    def run_heartbeat(self) -> None:
        """Keep talking while one operation takes long."""
        while not self.stop.wait(0.5):
            self.each_beat()
            self.show()


def build_bar(stream: TextIO) -> Progress:
    """The live display."""
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)


def quiet() -> None:
    """Libraries log errors only; downloads and tokenizers print no bars. What the user has set
    stays.
    """
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
