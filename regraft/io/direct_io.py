"""A file written past the page cache, for a tenth of the processor time; through it where the
system cannot.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BUFFER_BYTES = 4 << 20  # bytes staged at a time; a multiple of every block size


class DirectWriter:
    """Write-only binary file. Whole blocks of ROOM go straight to the disk, the rest when it is
    closed.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.descriptor = os.open(path, flags, 0o666)
        self.room = mmap.mmap(-1, BUFFER_BYTES)  # pages are aligned as O_DIRECT asks
        self.filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. OSError as from any file."""
        rest = memoryview(data)
        while len(rest):
            count = min(len(rest), BUFFER_BYTES - self.filled)
            self.room[self.filled : self.filled + count] = rest[:count]
            self.filled += count
            rest = rest[count:]
            if self.filled == BUFFER_BYTES:
                self._flush()

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._switch_to_buffered()
                self._flush()
        finally:
            os.close(self.descriptor)
            self.room.close()

    def _flush(self) -> None:
        with memoryview(self.room) as room:
            done = 0
            while done < self.filled:
                try:
                    done += os.write(self.descriptor, room[done : self.filled])
                except (
                    OSError
                ) as error:  # file systems that take the flag and then refuse, or short writes
                    if error.errno != errno.EINVAL or not self._switch_to_buffered():
                        raise
        self.filled = 0

    def _switch_to_buffered(self) -> bool:
        """Go on through the page cache, where any length may be written; whether that changed
        anything.
        """
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        direct = flags & getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~direct)
        return bool(direct)
