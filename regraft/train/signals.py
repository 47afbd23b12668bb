"""SIGTERM while training: finish the step, write a checkpoint, exit as the signal asks."""

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

STATUS = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended
AGAIN = 1.0  # seconds after the first SIGTERM from which one more counts as a second


class SigtermHandler:
    """Notes a SIGTERM while it is open; use it as a context in the main thread.

    A second SIGTERM, at least a second after the first, ends the process at once. Earlier ones do
    not count: when the launcher of a torchrun dies, Linux sends SIGTERM once for each of its
    threads (`distributed.init_distributed`).

    Attributes:
        requested: whether a SIGTERM has come.
        since: when it came, by `time.monotonic()`.
        before: the handler that was there before, None until the context is entered.
    """

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0
        self.before: Any = None

    def __enter__(self) -> SigtermHandler:
        # Python allows signal handlers in the main thread only. In another one nothing is noted.
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.handle_signal)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal: note the first, let the second end the process."""
        if self.requested and time.monotonic() - self.since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.requested:
            self.requested, self.since = True, time.monotonic()

    def exit_process(self, checkpoints: Sequence[Place]) -> None:
        """End the process with the exit status of SIGTERM; say which checkpoint there is.

        Args:
            checkpoints: the run's checkpoints, the newest last.
        """
        if distributed.is_rank0():
            saved = f"'{checkpoints[-1][2]}' is kept" if checkpoints else "no checkpoint yet"
            print(
                f"regraft: stopped by SIGTERM; {saved}; run the same command to resume",
                file=sys.stderr,
            )
        raise SystemExit(STATUS)
