"""Standard output and error that hold what a stranger can do to them: nothing breaks the work.

A reader may go away, a disk may be full, a descriptor may be closed, and what is printed may hold
names, prompts and texts of models with control characters in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from ..errors import printable


class GuardedStream:
    """A stream that notes when it can no longer be written, and then leaves out what comes.

    Characters that its encoding lacks are written as escapes.

    Attributes:
        stream: the stream behind it, None where the process was started without one.
        raises: whether losing the stream is an error for who writes.
        lost: why it can no longer be written; None while it can.
    """

    def __init__(self, stream: TextIO | None, raises: bool):
        self.stream, self.raises = stream, raises
        self.lost: OSError | None = None
        # Asked once: a terminal that has gone says that it is none, and would never be written.
        self.is_terminal = False
        if stream is None or stream.closed:
            self.lost = OSError(errno.EBADF, "it is closed")
        else:
            self.is_terminal = stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or leave it out."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        known = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda stream: stream.write(known))
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.is_terminal and self.lost is None

    def _attempt(self, act: Callable[[TextIO], object]) -> None:
        if self.lost is None and self.stream is not None:
            try:
                act(self.stream)
            except ValueError:  # Python's own word for a closed file
                self.lost = OSError(errno.EBADF, "it is closed")
            except OSError as error:
                self.lost = error
                self._discard()
        if self.lost is not None and self.raises:
            raise self.lost

    def _discard(self) -> None:
        """Send what is still buffered nowhere: Python would fail on it when the process ends."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, cast(TextIO, self.stream).fileno())
            os.close(null)


class PrintableStream:
    """A stream for text of any origin: control characters except newlines and tabs are escaped.

    Attributes:
        terminal: the stream behind it, for those who write escape sequences themselves.
    """

    def __init__(self, terminal: GuardedStream):
        self.terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)

    def write(self, text: str) -> int:
        """Write text, its control characters escaped."""
        self.terminal.write(printable(text, "\n\t"))
        return len(text)


@contextmanager
def guard_streams() -> Iterator[GuardedStream]:
    """Inside, `print` is safe on standard output and standard error.

    What cannot be written to standard error is left out; on standard output it is an error.

    Returns:
        Standard output; its `lost` says whether all was written.
    """
    open_missing_descriptors()
    out, err = GuardedStream(sys.stdout, raises=True), GuardedStream(sys.stderr, raises=False)
    with (
        contextlib.redirect_stdout(cast(TextIO, PrintableStream(out))),
        contextlib.redirect_stderr(cast(TextIO, PrintableStream(err))),
    ):
        yield out


def open_missing_descriptors() -> None:
    """Open descriptors 0, 1 and 2 where the process was started without them.

    The next file that is opened would get the number, and what a library writes to standard error
    would end in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
