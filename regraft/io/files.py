"""JSON files, files that appear whole or not at all, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RegraftError, first_line
from .schema import check_json, check_version, shorten

# Limits of JSON files. The largest that models have are indices of sharded weights: some 15 MB for
# 140,000 tensors. Memory for a file at the limits stays below 1 GB.
JSON_BYTES = 64_000_000
JSON_PARTS = 4_000_000  # lists and objects
JSON_DEPTH = 100  # of nesting
LINE_BYTES = 1_000_000  # of a row of metrics.jsonl, which has some 300

SHARED_BLOBS = ".huggingface-shared-blobs"  # marks the files that models of the hub's cache share
PART = ".regraft-part-"  # how the names of unfinished files begin


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which is renamed to `path` when the block ends.

    It is flushed to disk first, so that a kill or a power cut leaves the old file or the new one.
    When the block raises, it is removed. Its name holds the process id, so that two processes may
    write the same file. What a kill leaves is removed by `remove_parts`. Its mode follows the
    umask, whatever library writes it.

    Args:
        path: the file that is to appear or be replaced, in a folder that exists.
    """
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        # Some libraries write a temporary file of their own, which only its owner can read.
        if part.stat().st_mode != mode:
            part.chmod(mode)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what killed calls of `replace_file` left in a folder that nobody else writes in, and
    in its subfolders.
    """
    for part in folder.rglob(f"{PART}*"):
        part.unlink(missing_ok=True)


FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular_file(path: Path, what: str | None = None) -> None:
    """RegraftError unless a path is a regular file, or a link to one.

    Called before a file is opened: opening a named pipe waits for ever, and a device has no end.

    Args:
        path: of the file.
        what: what it is, for the message; None for its path.
    """
    what = what or f"'{path}'"
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise RegraftError(f"{what} is not there: check its path") from None
    except OSError as error:
        raise RegraftError(f"{what} cannot be opened ({error.strerror}): check its path") from error
    except ValueError:
        raise RegraftError(f"{what} has a name with a null character: check its path") from None
    if kind != stat.S_IFREG:
        name = FILE_KINDS.get(kind, "no file")
        raise RegraftError(f"{what} is {name}: give a regular file")


def check_inside(folder: Path, file: Path) -> None:
    """RegraftError unless a file that a folder names is a regular file inside it.

    Links inside the folder are followed. So are those of the Hugging Face cache, which lead from
    `models--X/snapshots/Y` to `models--X/blobs`, and on to `blobs` that models share. Everything
    else that leads out would read, or copy into an output, what the folder's author does not own.

    Args:
        folder: the folder, which may be a link itself.
        file: a path in it as its author wrote it.
    """
    check_regular_file(file)
    root, real = folder.resolve(), file.resolve()
    allowed = [root]
    for place in root.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            allowed.append(place.parent / "blobs")
            shared = place.parent.parent / "blobs"
            allowed += [shared] if (shared / SHARED_BLOBS).is_file() else []
    if not any(real.is_relative_to(place) for place in allowed):
        raise RegraftError(
            f"'{file}' leads to '{real}', outside of the folder '{folder}': copy the file into it"
        )


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with replace_file(path) as part:
        # A file name that is not UTF-8 has surrogates: JSON reads their escapes back.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replace_file(path) as part, part.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as the last line of a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read_json(path: Path, kind: Any = dict[str, Any], remedy: str = "fetch it again") -> Any:
    """The JSON value in a file of somebody else's.

    Args:
        path: a plain file.
        kind: what the value must be, see `schema.check_json`.
        remedy: what the user can do when it is anything else, for the error.

    RegraftError when it cannot be read or holds anything else.
    """
    try:
        if not path.is_file():
            raise RegraftError(f"'{path}' is no plain file: {remedy}")
        with path.open("rb") as stream:
            data = stream.read(JSON_BYTES + 1)
    except OSError as error:
        raise RegraftError(f"cannot read '{path}' ({error.strerror or error}): {remedy}") from error
    if len(data) > JSON_BYTES:
        raise RegraftError(f"'{path}' has more than {JSON_BYTES:,} bytes of JSON: {remedy}")
    return check_json(parse_json(data, f"'{path}'", remedy), kind, f"'{path}'", remedy)


def read_own_json(path: Path, kind: Any, remedy: str = "delete it and run again") -> Any:
    """The JSON value in a file that regraft wrote; RegraftError as in `read_json`.

    Args:
        path: the file.
        kind: the format's class, see `schema.check_json`.
        remedy: what the user can do when the file is damaged.
    """
    value = read_json(path, Any, remedy)
    check_version(value, f"'{path}'")
    return check_json(value, kind, f"'{path}'", remedy)


def read_json_if_exists(path: Path, kind: Any) -> Any:
    """The JSON value in a file of a run, None without the file; RegraftError when it is damaged."""
    return read_own_json(path, kind) if path.exists() else None


def read_json_lines(path: Path, kind: Any) -> list[Any]:
    """The rows of a file such as metrics.jsonl; none when there is no file.

    A last line cut short by a kill is left out. RegraftError for any other line that is not JSON
    or of another kind.

    Args:
        path: the file.
        kind: what each row must be, see `schema.check_json`.
    """
    rows: list[Any] = []
    if not path.exists():
        return rows
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), 1):
            where, remedy = f"'{path}' line {number}", "delete the line"
            if len(line) > LINE_BYTES:
                raise RegraftError(f"{where} has more than {LINE_BYTES:,} bytes: {remedy}")
            try:
                row = parse_json(line, where, remedy)
            except RegraftError:
                if stream.read(1):
                    raise
                break
            check_version(row, where)
            rows.append(check_json(row, kind, where, remedy))
    return rows


def parse_json(data: bytes, where: str, remedy: str) -> Any:
    """The JSON value in some bytes of UTF-8.

    Args:
        data: of a size that the caller has limited.
        where: the file, and perhaps the line, for the error.
        remedy: what the user can do, for the error.

    RegraftError when it is not JSON, is nested deeper than `JSON_DEPTH`, has more than `JSON_PARTS`
    lists and objects, a key twice with different values, or a number of too many digits.
    """
    # An empty list takes three bytes here and sixty in memory.
    parts = data.count(b"{") + data.count(b"[")
    if parts > JSON_PARTS:
        raise RegraftError(
            f"{where} has {parts:,} brackets, more than the limit of {JSON_PARTS:,}: {remedy}"
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_join_pairs)
        # Half a character, such as \ud800, is JSON, and can be written to no file. Bytes of a file
        # name that are no UTF-8 stand as some of these halves, and are written as such bytes.
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except RecursionError as error:
        raise RegraftError(f"{where} is nested deeper than {JSON_DEPTH}: {remedy}") from error
    except ValueError as error:
        raise RegraftError(f"{where} is not JSON ({first_line(error)}): {remedy}") from error
    if is_deeper(value, JSON_DEPTH):
        raise RegraftError(f"{where} is nested deeper than {JSON_DEPTH}: {remedy}")
    return value


def _join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its keys and values; ValueError when a key has two of them."""
    joined = dict(pairs)
    if len(joined) < len(pairs):
        for key, value in pairs:
            if joined[key] != value:
                raise ValueError(f"key {shorten(key)} has two values")
    return joined


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than a limit."""
    level = [value]
    for _ in range(limit + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [
            inner
            for item in containers
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file, cached until its size, times or inode change."""
    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)  # nobody can set the second back
    return _sha256(path.resolve(), stat.st_size, times, stat.st_ino)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, times: tuple[int, int], inode: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
