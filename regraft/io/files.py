"""JSON files, files that appear whole or not at all, hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RegraftError

PART = ".regraft-part-"  # how the names of unfinished files begin


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which is renamed to `path` when the block ends.

    It is flushed to disk first, so that a kill or a power cut leaves the old file or the new one.
    When the block raises, it is removed. Its name holds the process id, so that two processes may
    write the same file. What a kill leaves is removed by `remove_parts`.

    Args:
        path: the file that is to appear or be replaced, in a folder that exists.
    """
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    try:
        yield part
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
        part.write_text(text, encoding="utf-8")


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; RegraftError when it cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegraftError(f"cannot read '{path}' as JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise RegraftError(
            f"'{path}' holds a JSON {type(value).__name__}, not an object: fetch it again"
        )
    return value


def read_json_if_exists(path: Path) -> Any:
    """The JSON value in a file of a run, None without the file; RegraftError when it is damaged."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegraftError(f"{path} is not JSON ({error}): delete it and run again") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file such as metrics.jsonl; none when there is no file.

    A last line cut short by a kill is left out. RegraftError for any other line that is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RegraftError(
                    f"{path} line {number} is not JSON ({line[:40]!r}): delete the line"
                ) from error
    return rows


def sha256(path: Path) -> str:
    """Hex digest of a file, cached until its size or modification time changes."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, time: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
