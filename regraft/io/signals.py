"""Signals that ask the process to end: what runs is stopped in order, nothing is left behind."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

AGAIN = 1.0  # seconds after the first signal from which one more counts as a second
# Ctrl-C, `kill`, a terminal that is closed, Ctrl-backslash.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Terminated(SystemExit):
    """A signal asked the process to end; the exit status is what a shell reports for it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class SignalHandler:
    """Notes the first signal that asks the process to end while it is open; a context.

    A second one, at least a second after the first, does what it would have done outside. Earlier
    ones do not count: when the launcher of a torchrun dies, Linux sends SIGTERM once for each of
    its threads (`distributed.init_distributed`). A signal that was ignored stays ignored, as under
    nohup.

    Attributes:
        number: of the signal that came, None before.
        since: when it came, by `time.monotonic()`.
        before: the handlers that were there before, by signal.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        # Python allows signal handlers in the main thread only. In another one nothing is noted.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                # None: a handler that Python did not install and could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.handle_signal)
        return self

    def __exit__(self, *failure: object) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Put the earlier handlers back."""
        while self.before:
            signal.signal(*self.before.popitem())

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; let the second one through."""
        if self.number is None:
            self.number, self.since = number, time.monotonic()
            self.begin_stop(number)
        elif time.monotonic() - self.since > AGAIN:
            self.restore_handlers()
            signal.raise_signal(number)

    def begin_stop(self, number: int) -> None:
        """What the first signal starts; nothing here."""


class StopAtOnce(SignalHandler):
    """Inside, a signal raises KeyboardInterrupt (Ctrl-C) or `Terminated` in the main thread.

    So `finally` and contexts run, and temporary files go.
    """

    def begin_stop(self, number: int) -> None:
        """Raise the exception."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(number)


def lost_reader() -> int | None:
    """The signal that losing standard error amounts to; None while somebody can read it.

    SIGPIPE where the reader of a pipe is gone, SIGHUP where the terminal is.
    """
    error = getattr(sys.stderr, "lost", None)
    signals = {errno.EPIPE: signal.SIGPIPE, errno.EIO: signal.SIGHUP}
    return signals.get(error.errno) if error else None
