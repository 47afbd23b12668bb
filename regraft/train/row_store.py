"""Rows of tensors on disk, found by key: within a size limit, shared by runs and processes."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import RegraftError, explain_errors
from ..io import output, safetensors
from ..io.files import parse_json, replace_file, write_json
from ..io.schema import check_json

KIND = "teacher cache"  # of the root
FILE_BYTES = 16_000_000  # rows are gathered until they fill a file of this size
BLOCK = 4096  # bytes: a file takes whole blocks of the disk
Row = dict[str, Tensor]  # one row of a batch, by the names of its tensors


def check_cache_folder(root: Path) -> None:
    """RegraftError when a folder cannot be a teacher cache, since it holds other files."""
    foreign = output.find_foreign(root, None) if root.is_dir() else None
    if foreign and output.read_marker(root) is None:
        raise RegraftError(
            f"--teacher-cache '{root}' holds '{foreign}', which is not of regraft: give a new "
            "folder, or a cache that regraft made"
        )


class RowStore:
    """Rows in the folder `root/name`; all folders of `root` together stay within a limit.

    Each row has a checksum. A damaged file is removed and its rows are missing, so that they are
    computed again. When there is no room, new rows are not kept. Making room by removing the least
    recently used rows would be worse: rows come in passes over the text, and each would be removed
    before its turn comes again.

    RegraftError when the folder cannot be made.

    Attributes:
        files: names of the files that were read, or written by this process.
        places: for each row on disk, its file and its checksum.
        waiting: rows that are not on disk yet.
        size: bytes of these.
        kept: rows that this process has written.
        refused: rows for which there was no room.
        damaged: damaged files that were removed.
        seen: modification time of the folder, in nanoseconds, at the last scan.
    """

    def __init__(self, root: Path, name: str, limit: int, facts: Mapping[str, Any]):
        """Open or make the store.

        Args:
            root: folder of all stores that share the limit.
            name: of this store; what its rows depend on must be in it.
            limit: bytes of disk for everything in `root`.
            facts: written beside the rows, for people to read.
        """
        self.root, self.folder, self.limit = root, root / name, limit
        self.files: set[str] = set()
        self.places: dict[str, tuple[Path, int]] = {}
        self.waiting: dict[str, Row] = {}
        self.size = self.kept = self.refused = self.damaged = 0
        self.seen = -1
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self.lock():
                # Nobody writes while this process has the lock: what unfinished files there are,
                # killed writers left them.
                output.claim_folder(self.root, output.Marker(KIND))
                self.folder.mkdir(exist_ok=True)
                if not (self.folder / "facts.json").exists():
                    write_json(self.folder / "facts.json", dict(facts))
        except OSError as error:
            raise RegraftError(
                f"cannot keep teacher outputs in '{root}' ({error}): give another folder"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other process writes into the root."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def scan(self) -> None:
        """Find the rows that other runs and processes have written since the last scan."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self.seen:
            return
        self.seen = changed

        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self.files:
                continue
            self.files.add(file.name)
            try:
                self.places |= {key: (file, check) for key, check in read_checks(file).items()}
            except FileNotFoundError:
                continue  # another process has found it damaged and removed it
            except RegraftError:
                self.discard_file(file)

    def __contains__(self, key: str) -> bool:
        if key not in self.places and key not in self.waiting:
            self.scan()
        return key in self.places or key in self.waiting

    def get(self, key: str) -> Row | None:
        """A row, None when it is not there or damaged."""
        if key in self.waiting:
            return self.waiting[key]
        if key not in self:
            return None

        file, check = self.places[key]
        row = read_row(file, key)
        if not row or checksum(row) != check:
            self.discard_file(file)
            return None
        return row

    def add(self, key: str, row: Row) -> None:
        """Keep a row. It is on disk once there are rows for a full file, or after `flush`."""
        if key in self:
            return
        # Always a copy: the row is a view of its batch, which would stay in memory with it.
        self.waiting[key] = {
            name: value.detach().to("cpu", copy=True).contiguous() for name, value in row.items()
        }
        self.size += sum(value.nbytes for value in row.values())
        if self.size >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows if there is room; else forget them and count them as refused."""
        rows, self.waiting, self.size = self.waiting, {}, 0
        if not rows:
            return

        checks = {key: checksum(row) for key, row in rows.items()}
        tensors = {
            f"{key}/{name}": value for key, row in rows.items() for name, value in row.items()
        }
        data = save(tensors, {"rows": json.dumps(checks)})
        # The random part keeps apart two processes that write the same row.
        file = self.folder / f"{next(iter(rows))}-{secrets.token_hex(4)}.safetensors"

        # Room is measured and used under one lock, so that all writers together stay in the limit.
        try:
            with self.lock():
                if directory_size(self.root) + round_to_blocks(len(data)) > self.limit:
                    self.refused += len(rows)
                    return
                with replace_file(file) as part:
                    part.write_bytes(data)
        except OSError:  # the disk is full before the limit is reached
            self.refused += len(rows)
            return

        self.kept += len(rows)
        self.files.add(file.name)
        self.places |= {key: (file, check) for key, check in checks.items()}

    def discard_file(self, file: Path) -> None:
        """Remove a damaged file; its rows are missing from now on."""
        self.damaged += 1
        file.unlink(missing_ok=True)
        self.files.discard(file.name)
        self.places = {key: place for key, place in self.places.items() if place[0] != file}


def read_checks(file: Path) -> dict[str, int]:
    """Row -> its checksum, from the metadata of a file; RegraftError when it is damaged."""
    safetensors.read_header(file)  # also checks that the file is complete
    where, remedy = f"'{file}'", "delete it"
    with explain_errors(f"cannot read {where}", remedy):
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("rows", "")
    checks: dict[str, int] = check_json(
        parse_json(text.encode(), where, remedy), dict[str, int], where, remedy
    )
    return checks


def read_row(file: Path, key: str) -> Row:
    """One row of a file, empty when it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = sorted(name for name in opened.keys() if name.startswith(f"{key}/"))
            # Copies: the file may be removed while the row is in use.
            return {name.partition("/")[2]: opened.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError):
        return {}


def checksum(row: Row) -> int:
    """CRC-32 of a row's names, dtypes, shapes and bytes."""
    found = 0
    for name in sorted(row):
        value = row[name].contiguous()
        found = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), found)
        found = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def round_to_blocks(size: int) -> int:
    """Bytes of disk that a file of this size takes."""
    return -(-size // BLOCK) * BLOCK


def directory_size(root: Path) -> int:
    """Bytes of disk that everything below a folder takes, folders included."""
    total = BLOCK
    for folder, subfolders, files in os.walk(root):
        total += BLOCK * len(subfolders)
        for name in files:
            try:
                total += round_to_blocks((Path(folder) / name).stat().st_size)
            except FileNotFoundError:  # removed or renamed since it was listed
                continue
    return total
