"""What an exception means to a person: one line, and the exit code of a command that ends with it.

Wrong input, a full disk and too little memory are the user's to change. Anything else is a bug of
regraft: its traceback goes to a file.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
from importlib.metadata import version

from ..errors import RegraftError
from ..progress import is_main_process, print_line
from .linux import available_memory

OTHERS_WAIT = 5.0  # seconds
WRONG, BUG = 2, 70  # exit codes; 70 is EX_SOFTWARE of sysexits.h
NO_MEMORY = re.compile(
    r"not enough memory|allocate memory|out of memory|unable to mmap|bad_alloc|start new thread"
    r"|failed to map segment|Unable to allocate",
    re.IGNORECASE,
)
NO_SPACE = re.compile(r"No space left|Disk quota exceeded|StorageFull", re.IGNORECASE)
PEER_ENDED = re.compile(r"Connection (closed|reset) by (remote )?peer|Socket Timeout")
# Libraries that read and write files, by the first part of their exceptions' module.
FILE_LIBRARIES = {
    "safetensors", "safetensors_rust", "zipfile", "zlib", "_lzma", "lzma", "gzip", "pyarrow",
    "backports", "compression", "_zstd",
}  # fmt: skip


def report_failure(error: BaseException) -> int:
    """Say on one line of standard error what has failed; the exit code."""
    explained = explain_failure(error)
    if explained is not None:
        report_error(explained)
        return WRONG
    report_error(describe_bug(error))
    return BUG


def report_error(message: object) -> None:
    """One line on standard error. What went wrong in all processes of a torchrun, the first one
    says for all.
    """
    who = ""
    if not is_main_process():
        # torchrun ends this process meanwhile if the first one has failed too.
        time.sleep(OTHERS_WAIT)
        who = f"process {os.environ['RANK']}: "
    print_line(who + re.sub(r"\s*\n\s*", " ", str(message)).strip())


def explain_failure(error: BaseException) -> str | None:
    """What the user can do about an exception, on one line; None when it is a bug."""
    text = str(error)
    if isinstance(error, RegraftError):
        return text
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return explain_memory(text)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        remedy = "free space or check the path, then run the command again"
        return f"{error.strerror or text or type(error).__name__}{where}: {remedy}"

    if type(error).__module__.split(".")[0] in FILE_LIBRARIES:
        remedy = "free some space" if NO_SPACE.search(text) else "fetch or write that file again"
        return f"a file cannot be read or written ({text}): {remedy}, then run the command again"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"a name is not UTF-8 ({error.object[:200]}): rename it, then run the command again"
    if isinstance(error, RuntimeError) and PEER_ENDED.search(text):
        return f"another process of this run has ended ({text[:200]}): see what it said"
    return None


def explain_memory(text: str) -> str:
    """What is needed and what there is.

    Args:
        text: a message of Python, PyTorch or a file library, which may name the bytes.
    """
    needed = re.search(r"(?:allocate|mmap) (\d+) bytes", text)
    size = f"{int(needed[1]) / 1e6:,.1f} MB more are needed at once" if needed else text
    size = size or "Python could not have more"
    found = available_memory()
    # What had been taken is free again by now.
    there = f"; once it had failed, {found[0] / 1e6:,.1f} MB were {found[1]}" if found else ""
    return (
        f"not enough memory: {size}{there}; raise the limit, take a larger machine, "
        "or ask for less at a time"
    )


def describe_bug(error: BaseException) -> str:
    """The line on an exception that nobody has foreseen; its traceback goes to a file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
    try:
        file = write_traceback(error)
    except OSError as failure:
        return f"{what}; this is a bug in regraft (no file for its traceback: {failure})"
    return f"{what}; this is a bug in regraft: report it with its traceback, '{file}'"


def write_traceback(error: BaseException) -> str:
    """Write a traceback with version, command and platform to a new file; its path.

    It lies in the folder for temporary files and only the user can read it, since names and values
    are in it.
    """
    handle, path = tempfile.mkstemp(prefix="regraft-traceback-", suffix=".txt")
    lines = [
        f"regraft {version('regraft')}, Python {platform.python_version()}, {platform.platform()}",
        f"command: {shlex.join(sys.argv)}",
        "".join(traceback.format_exception(error)),
    ]
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write("\n".join(lines))
    return path
