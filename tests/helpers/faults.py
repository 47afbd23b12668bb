"""Commands whose file-system changes are counted, and one of which ends or fails.

`ForkServer` is an interpreter that has imported regraft and forks itself for every command: a
command takes a fraction of a second. `fs_faults.c`, loaded into it, counts the changes that the
command makes below one folder, also those of libraries in Rust or C++, and where a `Fault` says so
kills the command before a change, in the middle of a write, or lets changes fail.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fs_faults.c"
CLIENT = HERE / "fork_client.py"

# `struct state` of fs_faults.c.
HEAD = struct.Struct("<4q4i1024s")
ENTRY = struct.Struct("<i120s")
ENTRIES = 20_000
KINDS = {
    1: "create",
    2: "open",
    4: "write",
    8: "sync",
    16: "rename",
    32: "remove",
    64: "mkdir",
    128: "size",
    256: "link",
    512: "attributes",
}
CREATE, OPEN, WRITE, SYNC, RENAME, REMOVE, MKDIR, SIZE, LINK, ATTRIBUTES = KINDS
COUNT, KILL, FAIL = range(3)

# What a full disk refuses, and what a disk without inodes does.
NO_SPACE = CREATE | WRITE | MKDIR | SIZE | LINK
NO_INODES = CREATE | MKDIR | LINK


@dataclass(frozen=True)
class Change:
    """A change of the file system, in the order in which they happen."""

    kind: int
    name: str  # path below the root

    def __str__(self) -> str:
        return f"{KINDS.get(self.kind, self.kind)} {self.name}"


@dataclass(frozen=True)
class Fault:
    """What happens at which change.

    Attributes:
        mode: COUNT (nothing happens), KILL or FAIL.
        at: the number of the change, from 1.
        torn: when it is a write, half of it is done before.
        kinds: mask of the kinds of changes that fail from `at` on.
        error: errno of the failures.
        until: the first change that works again; 0: none does.
    """

    mode: int = COUNT
    at: int = 0
    torn: bool = False
    kinds: int = NO_SPACE
    error: int = errno.ENOSPC
    until: int = 0


UNDISTURBED = Fault()


@dataclass
class Finished:
    """How a command ended."""

    code: int  # exit code; -9 when it was killed
    out: str
    err: str
    changes: list[Change] = field(default_factory=list)
    failed: int = 0  # changes that were refused

    @property
    def said(self) -> str:
        """Its last line on standard error."""
        return (self.err.strip().splitlines() or ["nothing"])[-1]


def build_library() -> Path | None:
    """Compile the library, once for each version of its source; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"regraft-tests-{os.getuid()}" / f"faults-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(part), str(SOURCE), "-ldl"]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        part.replace(library)
    return library


class ForkServer:
    """An interpreter with regraft in memory. Used as a context.

    Attributes:
        library: the compiled fs_faults.c; None where it cannot be made: commands run, but nothing
            is counted and no fault happens.
        python: an interpreter that has imported regraft: a path to use as `sys.executable`. Its
            process passes signals on; the parent of what runs is the server.
    """

    def __init__(self, folder: Path):
        """Start it; `folder` is for the files that it shares with its commands."""
        folder.mkdir(parents=True, exist_ok=True)
        self.library = build_library()
        # A socket's path may have some 100 characters.
        self.sockets = tempfile.mkdtemp(prefix="regraft-tests-")
        self.address = f"{self.sockets}/socket"
        self.folder = folder
        # What takes the place of an interpreter, and is another fork: see fork_client.py.
        for mode in ("group", "own"):
            python = Path(self.sockets) / f"python-{mode}"
            start = f'exec {sys.executable} -I -S {CLIENT} {self.address} {mode} "$@"'
            python.write_text(f"#!/bin/sh\n{start}\n")
            python.chmod(0o755)
        self.python = str(python)
        state = folder / "state"
        size = HEAD.size + ENTRY.size * ENTRIES
        state.write_bytes(bytes(size))
        with state.open("r+b") as stream:
            self.state = mmap.mmap(stream.fileno(), size)

        self.environment = {
            **os.environ,
            **({"LD_PRELOAD": str(self.library)} if self.library else {}),
            "FS_FAULTS": str(state),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.fork_server", self.address],
            env=self.environment,
            stdin=subprocess.PIPE,  # its end ends the server, however this process ends
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said == "ready\n", f"the fork server said {said!r}"

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *failure: object) -> None:
        self.process.terminate()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.state.close()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def run(
        self,
        words: Sequence[str],
        root: Path,
        fault: Fault = UNDISTURBED,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        seconds: float = 120.0,
    ) -> Finished:
        """Run `regraft WORDS`.

        Args:
            words: the command line behind `regraft`.
            root: changes below this folder count.
            fault: what happens at which of them.
            cwd: the current folder; `root` by default.
            env: more of the environment.
            seconds: how long it may take; then it is killed and TimeoutError raised.
        """
        head = (0, fault.at, fault.until, 0, fault.mode, fault.torn, fault.error, fault.kinds)
        self.state[: HEAD.size] = HEAD.pack(*head, os.fsencode(root.resolve()))
        request = {
            "words": [str(word) for word in words],
            "cwd": str(cwd or root),
            "env": dict(env or {}),
            "group": 0,
        }
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            answer = self._ask(request, (stdout.fileno(), stderr.fileno()), seconds)

        count, _, _, failed, *_ = HEAD.unpack(self.state[: HEAD.size])
        self.state[: HEAD.size] = bytes(HEAD.size)  # nothing counts any more
        return Finished(
            os.waitstatus_to_exitcode(answer),
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
            [self._change(number) for number in range(min(count, ENTRIES))],
            failed,
        )

    def _ask(self, request: dict, files: tuple[int, int], seconds: float) -> int:
        """Send a request and wait; its wait status."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.connect(self.address)
            socket.send_fds(line, [json.dumps(request).encode() + b"\n"], files)
            line.settimeout(seconds)
            reader = line.makefile("rb")
            group = json.loads(reader.readline())["pid"]
            try:
                status = json.loads(reader.readline())["status"]
            except TimeoutError:
                os.killpg(group, signal.SIGKILL)
                raise
        # Whatever else the command had started ends before the files are looked at.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                break
            time.sleep(0.005)
        return status

    def _change(self, number: int) -> Change:
        start = HEAD.size + number * ENTRY.size
        kind, name = ENTRY.unpack(self.state[start : start + ENTRY.size])
        return Change(kind, os.fsdecode(name.split(b"\0", 1)[0]))
