"""Calls of Linux and its C library that Python lacks.

Where the system does not offer one, it does nothing, or returns that it could not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

AT_FDCWD = -100  # fcntl.h: paths are relative to the current folder
RENAME_EXCHANGE = 2  # linux/fs.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def exchange_paths(left: Path, right: Path) -> bool:
    """Exchange two files or folders in one step (renameat2); returns whether the system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(
        rename(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0
    )


def terminate_with_parent() -> None:
    """Send this process SIGTERM when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def available_memory() -> tuple[int, str] | None:
    """Bytes that this process may still have and what limits them; None where nothing says."""
    found = []
    meminfo, own = Path("/proc/meminfo"), Path("/proc/self/statm")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found.append((int(line.split()[1]) * 1024, "free on this machine"))

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and own.exists():
        used = int(own.read_text().split()[0]) * resource.getpagesize()
        found.append((max(limit - used, 0), f"left of this process's limit, {limit / 1e6:,.0f} MB"))

    # A container's limit: of cgroup v2, seen from inside.
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := _first_word(group / "memory.max")) != "max":
        used = int(_first_word(group / "memory.current"))
        found.append((max(int(most) - used, 0), "left of this container's limit"))
    return min(found, default=None)


def _first_word(file: Path) -> str:
    return file.read_text().split()[0]


def return_freed_memory() -> None:
    """Give freed memory back to the system, and from now on blocks of 1 MiB and more at once.

    glibc raises that threshold up to 32 MB by itself. Freed tensors below it stay with the process
    as fragments, which adds up to half a layer of memory for every few dozen layers.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        library.malloc_trim(0)


def free_memory() -> int | None:
    """Bytes that this process may still take: what the system has free, within its own limit.

    None where the system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable")), "")
    sizes = [int(available.split()[1]) * 1024] if available else []

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        sizes.append(max(0, limit - pages * resource.getpagesize()))
    return min(sizes, default=None)
