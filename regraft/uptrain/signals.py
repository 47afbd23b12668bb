"""SIGTERM while training: the step is finished, a checkpoint written, and the process leaves as the signal asks."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from .. import ranks
from .divergence import Place

STATUS = 128 + signal.SIGTERM


class Stopping:
    """Notes a SIGTERM while it is open; a second one ends the process at once. Use as a context, in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave(self, kept: Sequence[Place]) -> None:
        """End the process with the status of one that SIGTERM ended, saying what is kept."""
        if ranks.first():
            place = f"'{kept[-1][2]}' is kept" if kept else "there was nothing to keep yet"
            print(f"regraft: stopped by SIGTERM; {place} and the same command goes on", file=sys.stderr)
        raise SystemExit(STATUS)
