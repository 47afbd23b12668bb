"""What a person is told: lines on standard error, how far a long run is, tables.

A long run shows a live bar on a terminal, elsewhere a line at least every few seconds. Names and
texts come from outside: nothing here reads them as markup, and control characters are escaped.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from .errors import printable

# Called with the share of a piece of work that is done, 0 to 1, and a message.
ProgressCallback = Callable[[float, str], None]

BEAT = 8.0  # seconds between lines when there is no terminal
QUIET = 2.0  # seconds without a line at the start, so that an input error stands alone


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_main_process() -> bool:
    """Whether this process prints for all: rank 0 of a torchrun, or the only one."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def print_line(message: object) -> None:
    """One line on standard error, whatever names are in it."""
    print(f"regraft: {printable(message)}", file=sys.stderr, flush=True)


class PlainConsole(Console):
    """A rich console that shows text as it is: no markup, no emoji codes, no control characters.

    Styles come from arguments (`style=`), never from the text.
    """

    def __init__(self, stream: TextIO):
        """Print on a stream; where it escapes control characters, on the terminal behind it."""
        terminal = getattr(stream, "terminal", stream)
        super().__init__(file=terminal, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string, or a cell or title of a table, as rich shows it."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a `Text` comes from what others print while a live bar is shown."""
        super().print(
            *(
                Text(printable(item.plain, "\n\t"), item.style) if isinstance(item, Text) else item
                for item in objects
            ),
            **options,
        )

    def on_broken_pipe(self) -> None:
        """Leave it to the caller what a lost reader means; rich would end the process."""
        raise


def format_seconds(seconds: float) -> str:
    """Seconds as "3:07", from two hours on as "2.5 hours", from two days on as "2.5 days"."""
    for size, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{int(max(seconds, 0)) // 60}:{int(max(seconds, 0)) % 60:02d}"


class Ticker:
    """Shows the current phase, how far it is, and the time used and left. Used as a context.

    A thread shows it again every `BEAT` seconds while an operation takes long.

    Args:
        budget: seconds for everything; None: there is no limit.
        spent: seconds used by earlier, interrupted runs.
        stream: where to write; None: standard error, for rank 0 alone.
        each_beat: called twice a second from the thread.
    """

    # Share of the phase that is done, 0 to 1; None: not known.
    fraction: float | None
    # Seconds that the phase still takes; None: estimated from `fraction`.
    coming: float | None

    def __init__(
        self,
        budget: float | None = None,
        spent: float = 0.0,
        stream: TextIO | None = None,
        each_beat: Callable[[], None] = lambda: None,
    ):
        self.stream = stream or (sys.stderr if is_main_process() else None) or io.StringIO()
        self.budget, self.spent, self.begin = budget, spent, time.monotonic()

        # What is shown: set by `start` and `update`.
        self.phase, self.note, self.phase_begin = "starting", "", time.monotonic()
        self.fraction, self.coming = None, None

        self.last = self.begin - BEAT  # time of the last line: the first one is due at once
        self.each_beat = each_beat
        self.stop = threading.Event()
        self.bar = build_bar(self.stream) if self.stream.isatty() else None
        # A daemon, so that it never keeps a process alive whose main thread died.
        self.thread = threading.Thread(target=self.run_heartbeat, daemon=True)

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
        """Begin a phase and show it at once."""
        self.phase, self.note = printable(phase), ""
        self.fraction, self.coming, self.phase_begin = None, None, time.monotonic()
        self.show(force=True)

    def update(
        self, fraction: float | None = None, note: str = "", coming: float | None = None
    ) -> None:
        """Show how far the phase is.

        Args:
            fraction: share of the phase that is done, 0 to 1.
            note: a few words, such as the loss.
            coming: seconds that the phase still takes; None: estimated from `fraction`.
        """
        self.fraction, self.note, self.coming = fraction, printable(note), coming
        self.show()

    def format_line(self) -> str:
        """The line: share done, note, time that the phase still takes, time used and left."""
        elapsed = time.monotonic() - self.phase_begin
        parts = [f"{self.fraction:.0%}"] if self.fraction is not None else []
        parts += [self.note] if self.note else []

        # Below 2 % the pace of the phase is still a guess.
        coming = self.coming
        if coming is None and self.fraction and self.fraction > 0.02:
            coming = elapsed / self.fraction - elapsed

        # A phase with a budget is shortened to what is left: a longer guess is none.
        left = self.seconds_left()
        if coming is not None and (left is None or coming <= left):
            parts.append(f"about {format_seconds(coming)} to go here")

        parts.append(f"{format_seconds(self.seconds_used())} used")
        if left is not None:
            budget = self.budget or 0.0
            over = self.seconds_used() - budget
            used_up = f"{format_seconds(over)} over {format_seconds(budget)}"
            still = f"{format_seconds(left)} of {format_seconds(budget)} left"
            parts.append(used_up if over > 0 else still)
        return " · ".join(parts)

    def show(self, force: bool = False) -> None:
        """Draw the bar, or print a line if one is due or `force` is set."""
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
        """Show progress again and again, until the context ends."""
        while not self.stop.wait(0.5):
            self.each_beat()
            self.show()


def build_bar(stream: TextIO) -> Progress:
    """The live bar of a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    return Progress(*columns, console=PlainConsole(stream), transient=True)


def quiet() -> None:
    """Make libraries log errors only, and downloads and tokenizers print no bars.

    Environment variables that the user has set stay.
    """
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
