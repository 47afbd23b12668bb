"""Who owns an output folder: what regraft wrote in it, who writes there now, what may be removed.

Every folder that regraft makes holds a marker, which lists the files that regraft wrote. Only
these are ever replaced or removed, and only while they are as they were written. What only an
unfinished run needs lies in one work folder inside the marked folder.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from .files import PART, read_json, remove_parts, sha256, sync, write_json
from .linux import exchange_paths
from .request import find_difference, plain

MARKER = ".regraft.json"  # in every folder that regraft makes
WORK = ".regraft-work"  # in such a folder: what only an unfinished run needs
VERSION = 1  # of the marker
KEEP = "choose another output"


@dataclass(frozen=True)
class WrittenFile:
    """A file as regraft wrote it.

    Attributes:
        bytes: its size.
        sha256: hex digest.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: str | None = None) -> WrittenFile:
        """Describe a file; `known` is its sha256 where somebody has it already."""
        return cls(path.stat().st_size, known or sha256(path))

    def matches(self, path: Path, since: int) -> bool:
        """Whether a file is still what was written.

        Args:
            path: the file.
            since: nanoseconds at which its folder was complete; a file that nobody wrote, moved
                or gave another time after that is not read again.
        """
        found = path.lstat()
        if found.st_size != self.bytes or not stat.S_ISREG(found.st_mode):
            return False
        return found.st_ctime_ns <= since or self.sha256 == sha256(path)


@dataclass(frozen=True)
class Marker:
    """What a folder that regraft made says about itself.

    Attributes:
        kind: what is in the folder, such as "model" or "training".
        request: everything that was asked for, as values that JSON holds; None when nobody said.
        fingerprint: hash of everything that decides the files' bytes, where that is known.
        complete: whether everything that was asked for is there.
        names: files and folders that a run may write before it is complete. Of a complete output,
            the work folder where it waits to be removed.
        files: what was written, by path in the folder.
        result: what the command reports, once it is complete.
    """

    kind: str
    request: Any = None
    fingerprint: str | None = None
    complete: bool = False
    names: tuple[str, ...] = ()
    files: Mapping[str, WrittenFile] = field(default_factory=dict)
    result: Any = None

    @property
    def owns_work(self) -> bool:
        """Whether the work folder is in use, or waits to be removed."""
        return not self.complete or WORK in self.names

    def write(self, folder: Path) -> None:
        """Write the marker of a folder, whole or not at all."""
        write_json(folder / MARKER, {"version": VERSION, **asdict(self)})


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder, None without one; RegraftError when it is not regraft's."""
    file = folder / MARKER
    if not file.is_file() or file.is_symlink():
        return None
    found = read_json(file)
    try:
        if found.pop("version") != VERSION:
            raise ValueError
        files = {str(name): WrittenFile(**facts) for name, facts in found.pop("files").items()}
        marker = Marker(**found | {"files": files, "names": tuple(found["names"])})
        if not isinstance(marker.kind, str) or not isinstance(marker.complete, bool):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RegraftError(
            f"'{file}' is no marker that this version of regraft writes: {KEEP}"
        ) from error
    return marker


def sibling_path(target: Path, suffix: str, kind: str | None = None) -> Path:
    """A hidden folder beside `target` that does not exist yet, or is marked as of this kind.

    Where something else has the usual name, a number is added.
    """
    for number in itertools.count(1):
        path = target.with_name(f".{target.name}.{suffix}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(path) or _is_own(path, kind):
            return path
    raise AssertionError("there is always another number")


def _is_own(folder: Path, kind: str | None) -> bool:
    """Whether a folder is one that regraft made for this purpose, or empty."""
    if folder.is_symlink() or not folder.is_dir() or kind is None:
        return False
    try:
        marker = read_marker(folder)
        return find_foreign(folder, None) is None if marker is None else marker.kind == kind
    except (RegraftError, OSError):
        return False


def find_foreign(folder: Path, marker: Marker | None) -> str | None:
    """The first path in a folder, by name, that regraft did not write or that has changed since.

    Args:
        folder: the folder, which exists.
        marker: its marker; without one every path is foreign.
    """
    since = (folder / MARKER).stat().st_mtime_ns if marker else 0
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        top = name.partition("/")[0]
        if marker is None and re.fullmatch(rf"{PART}\d+-{re.escape(MARKER)}", name):
            continue  # of a call that was killed before the marker was there
        if marker is None:
            return name
        if name == MARKER or path.name.startswith(PART) or (top == WORK and marker.owns_work):
            continue

        written = marker.files.get(name)
        unfinished = not marker.complete and (top in marker.names or name in marker.files)
        if not unfinished and not (written and written.matches(path, since)):
            return name
    return None


def find_changed(folder: Path, marker: Marker) -> str | None:
    """The first file that a marker lists and that is missing, or is not as it was written."""
    since = (folder / MARKER).stat().st_mtime_ns
    for name, written in marker.files.items():
        path = folder / name
        if not path.exists() or not written.matches(path, since):
            return name
    return None


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder but its subfolders, which are entered; links are not followed.

    An empty subfolder comes itself: somebody made it.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                yield path
            yield from _walk(path)
        else:
            yield path


def describe_files(
    folder: Path, names: Iterable[str], hashes: Mapping[str, str] | None = None
) -> dict[str, WrittenFile]:
    """The files of a folder under these names, and those in subfolders of these names.

    Args:
        folder: the folder.
        names: of files and folders in it; those that do not exist are left out.
        hashes: sha256 of files that somebody has hashed already.
    """
    found = {}
    for name in sorted(set(names)):
        path = folder / name
        inside = _walk(path) if path.is_dir() and not path.is_symlink() else [path]
        for file in inside:
            if file.is_file() and not file.is_symlink():
                relative = file.relative_to(folder).as_posix()
                found[relative] = WrittenFile.of(file, (hashes or {}).get(relative))
    return found


def check_apart(out: str | Path, inputs: Iterable[tuple[str, str | Path | None]]) -> Path:
    """The real path of an output, which must lie apart from everything that is read.

    RegraftError when it is empty, is a file, or lies in an input or around it.

    Args:
        out: the output as it was given.
        inputs: paths that are read, or that other runs write to: (what it is, path). None is left
            out.
    """
    if not str(out):
        raise RegraftError(f"the output is '{out}', an empty name: give that of a new folder")
    target = real_path(out)
    if target.is_symlink():
        raise RegraftError(f"the output '{out}' is a link that leads back to itself: {KEEP}")
    if target.exists() and not target.is_dir():
        raise RegraftError(f"the output '{out}' is a file: {KEEP}")

    for what, given in inputs:
        path = real_path(given) if given else None
        if path is None:
            continue
        if path == target:
            raise RegraftError(f"the output '{out}' is the {what} '{given}': {KEEP}")
        if path.is_relative_to(target):
            raise RegraftError(f"the output '{out}' holds the {what} '{given}': {KEEP}")
        if target.is_relative_to(path):
            raise RegraftError(f"the output '{out}' lies in the {what} '{given}': {KEEP}")
    return target


def real_path(path: str | Path) -> Path:
    """A path without links and `..`; links that lead back to themselves stay."""
    return Path(os.path.realpath(path))


def check_replaceable(out: Path, overwrite: bool) -> None:
    """RegraftError when a whole output may not be put at `out`.

    Args:
        out: the real path of the output.
        overwrite: whether a finished output of regraft may be replaced, if it has no other files.
    """
    if not out.exists():
        return
    if not overwrite:
        raise RegraftError(f"'{out}' exists: {KEEP} or pass --overwrite")

    marker = read_marker(out)
    if foreign := find_foreign(out, marker):
        is_listed = marker is not None and foreign in marker.files
        why = "has changed since regraft wrote it" if is_listed else "is not of regraft"
        raise RegraftError(f"'{out}' is not overwritten: '{foreign}' in it {why}: {KEEP}")
    if marker and not marker.complete:
        raise RegraftError(
            f"'{out}' is not overwritten: it holds an unfinished {marker.kind}: {KEEP}, or delete "
            "it"
        )


def is_written(out: Path, request: Any) -> bool:
    """Whether an output is there, whole and unchanged, as this request asks for it.

    Args:
        out: the real path of the output.
        request: as in its marker; None for a request that is never taken for another one.
    """
    marker = read_marker(out)
    if request is None or marker is None or not marker.complete:
        return False
    return plain(request) == marker.request and find_changed(out, marker) is None


def publish(built: Path, out: Path, overwrite: bool) -> None:
    """Put a complete folder at `out` in one rename; what regraft wrote there before is removed.

    Args:
        built: the folder, on the same disk, with its marker.
        out: the real path of the output.
        overwrite: see `check_replaceable`.

    RegraftError when something that regraft did not write has come to `out` meanwhile.
    """
    for path in [*built.rglob("*"), built]:
        sync(path)
    check_replaceable(out, overwrite)

    if not out.exists():
        os.rename(built, out)
        sync(out.parent)
        return

    old = built
    if not exchange_paths(built, out):
        # Without an exchange in one step there is a moment without `out`.
        old = sibling_path(out, "regraft-old")
        os.rename(out, old)
        os.rename(built, out)
    sync(out.parent)
    remove_output(old)


def remove_output(folder: Path) -> None:
    """Remove what regraft wrote in a folder, and the folder when nothing else is in it.

    The marker goes last, so that a removal that was cut short can go on.
    """
    marker = read_marker(folder)
    if marker is None:
        return
    if marker.owns_work:
        shutil.rmtree(folder / WORK, ignore_errors=True)
    named = [] if marker.complete else list(describe_files(folder, marker.names))
    for name in (*marker.files, *named):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            path.unlink()
        # The subfolders that held it, from the inside out.
        for parent in path.relative_to(folder).parents[:-1]:
            _remove_if_empty(folder / parent)

    if _names(folder) <= {MARKER}:
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Inside, only this process writes in a folder, which exists.

    The system gives the lock back when the process dies, so a killed run leaves none.
    RegraftError when another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RegraftError(
                f"another run is writing '{folder}': wait for it, or stop all of its processes"
            ) from error
        yield
    finally:
        os.close(descriptor)


def check_claimable(folder: Path) -> None:
    """RegraftError when a folder is not regraft's and holds files."""
    if read_marker(folder) is None and (foreign := find_foreign(folder, None)):
        raise RegraftError(
            f"'{folder}' holds '{foreign}', which is not of regraft: {KEEP}, or a folder that does "
            "not exist yet"
        )


def claim_folder(folder: Path, marker: Marker) -> Marker:
    """The marker of a folder in which a run is begun or resumed; made where it is missing.

    RegraftError when the folder holds other files, another kind of output, or one that was asked
    for with other values.

    Args:
        folder: of the run.
        marker: what the folder is to hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_claimable(folder)
    there = read_marker(folder)
    if there is None:
        marker.write(folder)
        remove_parts(folder)
        return marker

    remove_parts(folder)
    if there.kind != marker.kind:
        raise RegraftError(
            f"'{folder}' holds a {there.kind}, not a {marker.kind}: {KEEP}, or delete it"
        )
    if difference := find_difference(there.request, marker.request):
        finished = "a finished" if there.complete else "an unfinished"
        raise RegraftError(
            f"'{folder}' holds {finished} {marker.kind} with {difference}: {KEEP}, or delete it"
        )
    return there


def release_folder(folder: Path, is_new: bool) -> None:
    """Give up a claimed folder in which nothing has been written yet; one that is new goes too."""
    work = folder / WORK
    written = [path for path in work.rglob("*") if not path.is_dir() and path.name != "lock"]
    if written or _names(folder) - {MARKER, WORK}:
        return
    shutil.rmtree(work, ignore_errors=True)
    (folder / MARKER).unlink(missing_ok=True)
    if is_new:
        folder.rmdir()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def complete_marker(
    folder: Path, names: Iterable[str], result: Any, hashes: Mapping[str, str] | None = None
) -> None:
    """Say in a folder's marker that all is there, then remove the work folder.

    Args:
        folder: a claimed folder.
        names: further files that were written, beside those of the marker's own names.
        result: what the command reports.
        hashes: sha256 of files that somebody has hashed already.
    """
    marker = read_marker(folder)
    assert marker is not None
    files = describe_files(folder, (*marker.names, *names), hashes)
    # The names say that the work folder is still there, so that a call after a kill removes it.
    replace(marker, complete=True, names=(WORK,), files=files, result=result).write(folder)
    remove_work(folder)


def remove_work(folder: Path) -> None:
    """Remove the work folder of a complete output, where its marker says that one is left."""
    marker = read_marker(folder)
    if marker is not None and marker.complete and marker.owns_work:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        replace(marker, names=()).write(folder)
