"""The tokens of one file on disk, with a journal from which a killed build continues.

A folder per file:

- `tokens`: ids, 2 or 4 bytes each.
- `documents`: where each document ends, as two numbers of 8 bytes: tokens and bytes of text, both
  counted from the start of the file.
- `journal.json`: how far the file is read, see `CacheJournal`.

Tokens are appended block by block, and the journal is replaced when its block is on disk. What lies
behind the journal's counts is cut off when a build continues, so the bytes do not depend on where
an earlier build was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy
from filelock import FileLock, Timeout

from ..errors import RegraftError, explain_errors
from ..io.files import read_own_json, remove_parts, write_json
from ..io.identity import identify_file
from ..io.request import SAMPLED
from ..io.schema import build, shorten
from .documents import BadLines, DocumentPiece, PositionFields, ReadPosition, read_pieces
from .text import MAX_LINE_BYTES
from .tokenizer import BatchTokenizer

BLOCK = 1 << 20  # characters that are tokenised at once
BLOCK_DOCUMENTS = 1 << 13  # documents that are tokenised at once, where they are short
DOCUMENT_BYTES = 16  # size of an entry of `documents`
LARGE = 1 << 26  # bytes of a file; the content of larger ones is sampled
Progress = Callable[["TokenCache"], None]


@dataclass
class CacheJournal:
    """How far a file is read; `journal.json` has these fields.

    Attributes:
        place: where reading continues, the fields of a `ReadPosition`.
        tokens: in the cache.
        documents: that ended so far.
        bytes: UTF-8 bytes of the text of these tokens.
        largest: the largest token id.
        bad: lines that could not be read.
        named: the first of them: file, line and what is wrong.
        done: whether the file is read to its end.
    """

    place: PositionFields = field(default_factory=lambda: ReadPosition().json())
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    largest: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    done: bool = False

    def check(self, file: Path, remedy: str) -> None:
        """RegraftError when a number is none that a build can have written."""
        counts = (self.tokens, self.documents, self.bytes, self.largest, self.bad)
        place = (self.place["offset"], self.place["line"], self.place["begin"])
        if min(*counts, *place) < 0 or self.largest >= 1 << 32:
            raise RegraftError(
                f"'{file}' has counts that cannot be, {shorten(asdict(self))}: {remedy}"
            )


class TokenCache:
    """The token cache of one file.

    Args:
        root: folder in which this cache has a folder of its own. Its name follows from name and
            content of the file, the field and the tokenizer: what changes any of them gets a new
            cache.
        file: the text.
        name: the key or column that holds the text.
        tokenizer: what makes the tokens.
        most: bytes that a line may have.

    RegraftError when the file cannot be read.
    """

    def __init__(
        self,
        root: Path,
        file: Path,
        name: str,
        tokenizer: BatchTokenizer,
        most: int = MAX_LINE_BYTES,
    ):
        self.file, self.name, self.tokenizer, self.most = file, name, tokenizer, most
        try:
            facts = file.stat()
        except OSError as error:
            raise RegraftError(
                f"cannot read '{file}' ({error.strerror}): check the file and its rights"
            ) from error

        self.root, self.size = root, facts.st_size  # bytes on disk
        self.time = facts.st_mtime_ns
        self.journal = CacheJournal()

    @cached_property
    def folder(self) -> Path:
        """The folder of this cache. The file is hashed for it, so only where it is needed."""
        content = identify_file(self.file, LARGE - self.size)
        # Sampling may miss an edit; the time of the last one decides then.
        time = self.time if content.startswith(SAMPLED) else None
        identity = [self.file.name, content, time, self.name, self.tokenizer.name]
        # Another limit may leave out other lines.
        key = json.dumps(identity + ([] if self.most == MAX_LINE_BYTES else [self.most]))
        word = re.sub(r"[^\w.-]", "_", self.file.name)[:60]
        return self.root / f"{word}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def read_journal(self) -> CacheJournal:
        """How far the file is read now, as the disk has it: another process may be reading it."""
        if not self.journal.done:
            file, remedy = self.folder / "journal.json", f"delete the token cache '{self.folder}'"
            self.journal = CacheJournal()
            if file.exists():
                self.journal = build(CacheJournal, read_own_json(file, CacheJournal, remedy))
                self.journal.check(file, remedy)
        return self.journal

    def array(self, what: str) -> numpy.ndarray:
        """One of the two tables, mapped into memory and not read.

        Args:
            what: "tokens" for ids of shape (tokens,), or "documents" for where documents end, shape
                (documents, 2): tokens and bytes from the start of the file.
        """
        shape: tuple[int, ...] = (self.journal.documents, 2)
        dtype = "<i8"
        if what == "tokens":
            dtype, shape = self.tokenizer.dtype, (self.journal.tokens,)

        if not shape[0]:  # an empty file cannot be mapped
            return numpy.zeros(shape, "<i8")
        with explain_errors(f"cannot read the token cache '{self.folder}'", "delete it"):
            table = numpy.memmap(self.folder / what, dtype, "r", shape=shape)
        if what == "documents":
            ends, tokens = table[:, 0], self.journal.tokens
            if ends[0] < 0 or ends[-1] > tokens or (ends[1:] < ends[:-1]).any():
                raise RegraftError(
                    f"the token cache '{self.folder}' has documents that end before they begin, or "
                    f"behind its {tokens} tokens: delete it"
                )
        return table

    def fill(
        self,
        enough: int | None,
        skip_bad: bool,
        report_progress: Progress = lambda part: None,
    ) -> bool:
        """Read on until the file ends; False, at once, when another process is doing so.

        Args:
            enough: stop before the file's end when the cache has so many tokens. None: do not.
            skip_bad: leave out and count lines that cannot be read.
            report_progress: called with this cache after each block.

        RegraftError for a bad line unless `skip_bad`, and when the cache cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # the system drops the lock of a process that is killed
            with FileLock(self.folder / "lock", timeout=0):
                remove_parts(self.folder)  # a journal that was being written in a kill
                known = self.read_journal()
                # Another process may have read all of it since the caller looked.
                if not known.done:
                    self._fill(known, enough, BadLines(skip_bad), report_progress)
        except Timeout:
            return False
        except OSError as error:
            raise RegraftError(
                f"cannot write the token cache '{self.folder}' ({error.strerror or error}): free "
                "some space or give another folder with --cache"
            ) from error
        return True

    def _fill(
        self,
        known: CacheJournal,
        enough: int | None,
        bad: BadLines,
        report_progress: Progress,
    ) -> None:
        """`fill` while the lock is held, from where the journal says."""
        with (
            (self.folder / "tokens").open("ab") as ids,
            (self.folder / "documents").open("ab") as ends,
        ):
            known = self._cut_to_journal(known, ids, ends)
            bad.count, bad.named = known.bad, list(known.named)

            place = build(ReadPosition, dict(known.place))
            block: list[DocumentPiece] = []
            size = 0  # characters in the block
            # Whether the journal has all that was appended. It has not inside a long document that
            # cannot be read on from its middle: stopping there would read it again for ever.
            in_journal = True
            for piece in read_pieces(self.file, self.name, place, bad, self.most):
                # Tokens are counted when a block is appended: this stops between two blocks only.
                if enough is not None and known.tokens >= enough and not block and in_journal:
                    return

                block.append(piece)
                size += len(piece.text)
                if size >= BLOCK or len(block) >= BLOCK_DOCUMENTS:
                    self._append(block, known, ids, ends)
                    in_journal = piece.after is not None
                    if piece.after is not None:
                        self._write_journal(known, piece.after, bad, ids, ends)
                        report_progress(self)
                    block, size = [], 0

            self._append(block, known, ids, ends)
            known.done = True
            self._write_journal(known, ReadPosition(), bad, ids, ends)
            report_progress(self)

    def _cut_to_journal(self, known: CacheJournal, ids: BinaryIO, ends: BinaryIO) -> CacheJournal:
        """Cut off what a killed build wrote after its last journal; the journal to continue from.

        Files that are shorter than the journal says are started again: the disk lost something.
        """
        width = numpy.dtype(self.tokenizer.dtype).itemsize
        if ids.tell() < known.tokens * width or ends.tell() < known.documents * DOCUMENT_BYTES:
            known = self.journal = CacheJournal()
        ids.truncate(known.tokens * width)
        ends.truncate(known.documents * DOCUMENT_BYTES)
        return known

    def _append(
        self, block: list[DocumentPiece], known: CacheJournal, ids: BinaryIO, ends: BinaryIO
    ) -> None:
        """Tokenise a block, append it to both files and count it in the journal, in memory."""
        rows = self.tokenizer([piece.text for piece in block]) if block else []
        table = []  # (tokens, bytes) at each document's end
        for piece, row in zip(block, rows, strict=True):
            if piece.ends:
                row.extend(self.tokenizer.end)
            known.tokens += len(row)
            known.bytes += len(piece.text.encode())
            if piece.ends:
                table.append((known.tokens, known.bytes))

        tokens = numpy.fromiter(chain.from_iterable(rows), self.tokenizer.dtype)
        known.documents += len(table)
        known.largest = max(known.largest, int(tokens.max(initial=0)))
        ids.write(tokens.tobytes())
        ends.write(numpy.array(table, "<i8").tobytes())

    def _write_journal(
        self, known: CacheJournal, place: ReadPosition, bad: BadLines, *files: BinaryIO
    ) -> None:
        """Write the journal once the files are on disk: it must never count what is not there."""
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        known.place, known.bad, known.named = place.json(), bad.count, bad.named
        write_json(self.folder / "journal.json", asdict(known))
