"""SIGTERM while training: the step is finished, a checkpoint written, and the process leaves as the signal asks."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from .. import distributed
from .divergence import Place

STATUS = 128 + signal.SIGTERM
AGAIN = 1.0  # seconds after which a second signal is one


class SigtermHandler:
    """Notes a SIGTERM while it is open; one more after a second ends the process at once. Use as a context, in the main
    thread.

    A launcher's death is told as SIGTERM (`ranks.joined`), by Linux once for each of its threads.
    """

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0
        self.before: Any = None

    def __enter__(self) -> SigtermHandler:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.handle_signal)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        if self.asked and time.monotonic() - self.since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.asked:
            self.asked, self.since = True, time.monotonic()

    def exit_process(self, kept: Sequence[Place]) -> None:
        """End the process with the status of one that SIGTERM ended, saying what is kept."""
        if distributed.is_rank0():
            place = f"'{kept[-1][2]}' is kept" if kept else "there was nothing to keep yet"
            print(
                f"regraft: stopped by SIGTERM; {place} and the same command goes on",
                file=sys.stderr,
            )
        raise SystemExit(STATUS)
