"""A file written past the page cache (O_DIRECT), which takes a tenth of the processor time.

Where the system or the file system cannot, it is written through the page cache.
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
    """A binary file to write, used as a context.

    Bytes are collected in a buffer, which goes to the disk when it is full and when the file is
    closed. After an exception in the block what is left in the buffer is not written.
    """

    def __init__(self, path: Path):
        """Create the file, or empty it. OSError as from `open`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT answers
                raise
            self.descriptor = os.open(path, flags, 0o666)
        self.buffer = mmap.mmap(-1, BUFFER_BYTES)  # aligned to pages, as O_DIRECT requires
        self.filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. OSError, such as for a full disk, perhaps only at a later call."""
        rest = memoryview(data)
        while len(rest):
            count = min(len(rest), BUFFER_BYTES - self.filled)
            self.buffer[self.filled : self.filled + count] = rest[:count]
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
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                # The last bytes need not fill a block, which O_DIRECT would refuse.
                self._switch_to_buffered()
                self._flush()
        finally:
            os.close(self.descriptor)
            self.buffer.close()

    def _flush(self) -> None:
        """Write what the buffer holds."""
        with memoryview(self.buffer) as view:
            done = 0
            while done < self.filled:
                try:
                    done += os.write(self.descriptor, view[done : self.filled])
                except OSError as error:
                    # Some file systems accept O_DIRECT and refuse the write, and after a short
                    # write the rest is not aligned. Both end here once.
                    if error.errno != errno.EINVAL or not self._switch_to_buffered():
                        raise
        self.filled = 0

    def _switch_to_buffered(self) -> bool:
        """Clear O_DIRECT, so that any length may be written; returns whether it was set."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        direct = flags & getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~direct)
        return bool(direct)
