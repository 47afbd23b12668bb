"""The tokens of one file on disk: appended block by block, with a journal from which a killed build goes on.

A folder per file: `tokens` (ids, 2 or 4 bytes each), `documents` (where each ends in tokens and in bytes of text, both
counted from the file's begin, 8 bytes each), `journal.json`. The journal is replaced after its block is on disk; what
lies behind what it says is cut off when the build goes on. So the bytes do not depend on where a build was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from filelock import FileLock, Timeout

from ..errors import RegraftError
from ..io.files import write_json
from .documents import BadLines, DocumentPiece, ReadPosition, read_pieces
from .tokenizer import BatchTokenizer

BLOCK = 1 << 20  # characters that are tokenised at once
BLOCK_DOCUMENTS = 1 << 13  # documents
Tell = Callable[["TokenCache"], None]


@dataclass
class CacheJournal:
    """How far a file is read: the place; tokens, documents and bytes of text so far; the lines that could not be."""

    place: dict[str, Any] = field(default_factory=lambda: ReadPosition().json())
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    largest: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    done: bool = False


class TokenCache:
    """The cache of one file, `name` the field that holds its text, in a folder of its own below `root`."""

    def __init__(self, root: Path, file: Path, name: str, tokens: BatchTokenizer):
        self.file, self.name, self.tokens = file, name, tokens
        try:
            facts = file.stat()
        except OSError as error:
            raise RegraftError(
                f"cannot read '{file}' ({error.strerror}): check the file and its rights"
            ) from error
        self.size = facts.st_size
        key = json.dumps([str(file.resolve()), self.size, facts.st_mtime_ns, name, tokens.name])
        word = re.sub(r"[^\w.-]", "_", file.name)[:60]
        self.folder = root / f"{word}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.journal = CacheJournal()

    def read_journal(self) -> CacheJournal:
        """How far it is now, as the disk has it."""
        if not self.journal.done:
            try:
                self.journal = CacheJournal(
                    **json.loads((self.folder / "journal.json").read_text(encoding="utf-8"))
                )
            except FileNotFoundError:
                self.journal = CacheJournal()
            except (OSError, ValueError, TypeError) as error:
                raise RegraftError(
                    f"cannot read the token cache '{self.folder}' ({error}): delete it"
                ) from error
        return self.journal

    def array(self, what: str) -> numpy.ndarray:
        """`tokens` (n,), or `documents` (n, 2); mapped, not read."""
        ids = what == "tokens"
        shape = (self.journal.tokens,) if ids else (self.journal.documents, 2)
        if not shape[0]:
            return numpy.zeros(shape, "<i8")
        try:
            return numpy.memmap(
                self.folder / what, self.tokens.dtype if ids else "<i8", "r", shape=shape
            )
        except (OSError, ValueError) as error:
            raise RegraftError(
                f"cannot read the token cache '{self.folder}' ({error}): delete it"
            ) from error

    def fill(self, enough: int | None, skip_bad: bool, tell: Tell = lambda part: None) -> bool:
        """Read on until the file ends or `enough` tokens are there; False when another process is doing so.

        RegraftError for a bad line unless `skip_bad`, and where nothing can be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock", timeout=0):
                self._fill(self.read_journal(), enough, BadLines(skip_bad), tell)
        except Timeout:
            return False
        except OSError as error:
            raise RegraftError(
                f"cannot write the token cache '{self.folder}' ({error.strerror or error}): free some space or give "
                "another folder with --cache"
            ) from error
        return True

    def _fill(self, known: CacheJournal, enough: int | None, bad: BadLines, tell: Tell) -> None:
        width = numpy.dtype(self.tokens.dtype).itemsize
        with (
            (self.folder / "tokens").open("ab") as ids,
            (self.folder / "documents").open("ab") as ends,
        ):
            if (
                ids.tell() < known.tokens * width or ends.tell() < known.documents * 16
            ):  # a disk that lost something
                known = self.journal = CacheJournal()
            ids.truncate(known.tokens * width)
            ends.truncate(known.documents * 16)
            bad.count, bad.named = known.bad, list(known.named)
            block: list[DocumentPiece] = []
            size = 0
            for piece in read_pieces(self.file, self.name, ReadPosition(**known.place), bad):
                if enough is not None and known.tokens >= enough and not block:
                    return
                block.append(piece)
                size += len(piece.text)
                if size >= BLOCK or len(block) >= BLOCK_DOCUMENTS:
                    self._append(block, known, ids, ends)
                    if piece.after is not None:
                        self._write_journal(known, piece.after, bad, ids, ends)
                        tell(self)
                    block, size = [], 0
            self._append(block, known, ids, ends)
            known.done = True
            self._write_journal(known, ReadPosition(), bad, ids, ends)
            tell(self)

    def _append(
        self, block: list[DocumentPiece], known: CacheJournal, ids: BinaryIO, ends: BinaryIO
    ) -> None:
        table = []
        rows = self.tokens([piece.text for piece in block]) if block else []
        for piece, row in zip(block, rows, strict=True):
            if piece.ends:
                row.extend(self.tokens.end)
            known.tokens += len(row)
            known.bytes += len(piece.text.encode())
            if piece.ends:
                table.append((known.tokens, known.bytes))
        found = numpy.fromiter(chain.from_iterable(rows), self.tokens.dtype)
        known.documents += len(table)
        known.largest = max(known.largest, int(found.max(initial=0)))
        ids.write(found.tobytes())
        ends.write(numpy.array(table, "<i8").tobytes())

    def _write_journal(
        self, known: CacheJournal, place: ReadPosition, bad: BadLines, *files: BinaryIO
    ) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        known.place, known.bad, known.named = place.json(), bad.count, bad.named
        write_json(self.folder / "journal.json", asdict(known))
