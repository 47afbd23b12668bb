"""Rows of tensors on disk, found again by key: files of some MB, within a size, shared by runs and processes."""

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

from ..errors import RegraftError
from ..io import safetensors
from ..io.files import replace_file, write_json

FILE_BYTES = 16_000_000  # bytes of a file, or one row
BLOCK = 4096  # what a disk gives out
Row = dict[str, Tensor]


class RowStore:
    """The folder `root/name`; all folders of `root` together stay within `limit` bytes of disk.

    A file is written whole or not at all. When there is no room, what is new is not kept: rows come round in passes,
    where making room by what was used last would throw out every row before its turn. Each row has a checksum; a
    damaged file is removed and its rows are missing, so that they are made anew. `facts` are put beside for people.
    """

    def __init__(self, root: Path, name: str, limit: int, facts: Mapping[str, Any]):
        self.root, self.folder, self.limit = root, root / name, limit
        self.files: set[str] = set()
        self.places: dict[str, tuple[Path, int]] = {}
        self.waiting: dict[str, Row] = {}
        self.size = self.kept = self.refused = self.damaged = 0
        self.seen = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                for left in self.root.glob("*/*.part"):  # of a writer that was killed
                    left.unlink()
                if not (self.folder / "facts.json").exists():
                    write_json(self.folder / "facts.json", dict(facts))
        except OSError as error:
            raise RegraftError(
                f"cannot keep teacher outputs in '{root}' ({error}): give another folder"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other process writes into the root."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def scan(self) -> None:
        """Take in files that other runs and processes have written since."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self.seen:
            return
        self.seen = changed
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name not in self.files:
                self.files.add(file.name)
                try:
                    safetensors.read_header(file)
                    with safe_open(file, framework="pt") as opened:
                        rows = json.loads(opened.metadata()["rows"])
                    self.places |= {key: (file, check) for key, check in rows.items()}
                except FileNotFoundError:
                    continue
                except (RegraftError, SafetensorError, OSError, ValueError, TypeError, KeyError):
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
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if name.startswith(f"{key}/")]
                row = {
                    name.partition("/")[2]: opened.get_tensor(name).clone()
                    for name in sorted(names)
                }
        except (OSError, SafetensorError):
            row = {}
        if not row or checksum(row) != check:
            self.discard_file(file)
            return None
        return row

    def add(self, key: str, row: Row) -> None:
        """Keep a row; it is on disk once the file it belongs to is full, or after `flush`."""
        if key in self:
            return
        self.waiting[key] = {
            name: value.detach().to("cpu", copy=True).contiguous() for name, value in row.items()
        }
        self.size += sum(value.nbytes for value in row.values())
        if self.size >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits, if there is room for it; else it is forgotten and counted in `refused`."""
        rows, self.waiting, self.size = self.waiting, {}, 0
        if not rows:
            return
        checks = {key: checksum(row) for key, row in rows.items()}
        tensors = {
            f"{key}/{name}": value for key, row in rows.items() for name, value in row.items()
        }
        data = save(tensors, {"rows": json.dumps(checks)})
        file = (
            self.folder / f"{next(iter(rows))}-{secrets.token_hex(4)}.safetensors"
        )  # two may keep the same row
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


def checksum(row: Row) -> int:
    """Of names, kinds, shapes and every byte."""
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
    for place, folders, files in os.walk(root):
        total += BLOCK * len(folders)
        for name in files:
            try:
                total += round_to_blocks((Path(place) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return total
