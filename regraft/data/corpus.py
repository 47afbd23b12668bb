"""Texts to tables of rows: token caches, filled as far as needed by as many processes as run."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from .. import distributed
from ..errors import RegraftError
from ..io.files import read_json_if_exists, write_json
from ..modeling.loading import bos_token_id
from ..progress import print_line
from .files import find_files
from .rows import CachedRows, MixedRows, check_not_empty, mix_by_share
from .text import Text
from .token_cache import TokenCache
from .tokenizer import BatchTokenizer

# At least so many tokens of a text are read, even when fewer are trained on: rows are shuffled over
# all that was read, and a short run shall not see the first files alone.
MIN_READ_TOKENS = 1 << 24
WAIT = 0.2  # seconds between two looks at a file that another process is reading
Progress = Callable[[float, str], None]  # (share done, what is being done)


class CorpusFacts(TypedDict):
    """What one text had, what was read of it and what became rows; a row of the ledger's `text`."""

    path: str  # as the user gave it
    files: int
    file_bytes: int  # on disk, compressed files as they are
    files_read: int  # files read to their end
    complete: bool  # whether all of the text was read
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents that were read
    tokens: int
    rows: int
    row_tokens: int  # tokens in all rows
    cut_off_tokens: int  # tokens dropped by overflow "cut"
    bad_lines: int  # lines that could not be read
    bad: list[str]  # the first five of them: file, line and what is wrong


class PinnedRows(TypedDict):
    """Which rows a run was started with; kept in `rows-LENGTH.json` of its folder for text."""

    files: list[str]  # names of the files that the rows come from
    tokens: list[str]  # of each file a hash of the tokens that the rows take from it
    options: list[list[Any]]  # of each text: share, field, overflow, and whether it begins with BOS
    rows: list[int]  # how many rows each text gives


class Corpus:
    """One text: its files, the token cache of each, and the rows made of them.

    Args:
        text: which files, and how they are read.
        tokenizer: a tokenizer of transformers.
        cache: folder that keeps the tokens. None: a temporary one, deleted with this object.
        report_progress: called with the share that is read, 0 to 1, and a few words.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Any,
        cache: Path | None = None,
        report_progress: Progress = lambda share, words: None,
    ):
        self.text, self.tokenizer = text, BatchTokenizer(tokenizer)
        self.report_progress = report_progress
        if cache is None:
            cache = Path(tempfile.mkdtemp(prefix="regraft-text-"))
            # Tables may outlive this object and still read the cache. Each of them holds the
            # tokenizer, so the folder goes when the last one does.
            weakref.finalize(self.tokenizer, shutil.rmtree, cache, ignore_errors=True)

        root = cache / self.tokenizer.name
        self.parts = [
            TokenCache(root, file, text.field, self.tokenizer, text.max_line_bytes)
            for file in find_files(text.path)
        ]
        self.used: list[TokenCache] = []  # the files that the last table was made of
        self.table: CachedRows | None = None
        self.reported_bad_lines = 0

    def fill_caches(self, needed: int | None) -> int:
        """Read until the caches hold the first `needed` tokens (None: all); how many they hold.

        Called by every process of a run. Each starts with a different file and skips files that
        another one is reading. RegraftError for a bad line unless the text says to skip them.
        """
        while window := self.find_unread_files(needed):
            # The window has one file a process: rank r begins with the r-th and tries the others
            # after it. Where all of them are locked by others, there is nothing to do but wait.
            turn = distributed.rank() % len(window)
            if not any(
                part.fill(enough, self.text.skip_bad, self.progress_callback(needed))
                for part, enough in window[turn:] + window[:turn]
            ):
                time.sleep(WAIT)

        self.used = []
        available = 0
        for part in self.parts:
            if needed is None or available < needed:
                self.used.append(part)
                available += part.journal.tokens
        self.report_bad_lines()
        return available

    def find_unread_files(self, needed: int | None) -> list[tuple[TokenCache, int | None]]:
        """The next files to read, at most one a process, each with how many tokens are enough.

        Args:
            needed: tokens of the whole text that are needed, None for all of it.
        """
        available = 0
        window: list[tuple[TokenCache, int | None]] = []
        for part in self.parts:
            missing = None if needed is None else needed - available
            if (missing is not None and missing <= 0) or len(window) == distributed.world_size():
                break

            known = part.read_journal()
            if not known.done and (missing is None or known.tokens < missing):
                window.append((part, missing))
            available += known.tokens
        return window

    def progress_callback(self, needed: int | None) -> Callable[[TokenCache], None]:
        """A callback for `TokenCache.fill` that reports how much of the text is read.

        The share is of bytes of files or, where `needed` is given, of tokens if that is more.
        """
        total = sum(part.size for part in self.parts)

        def report(now: TokenCache) -> None:
            tokens = sum(part.journal.tokens for part in self.parts)
            size = sum(part.size * (part.journal.done or part is now) for part in self.parts)
            share = size / max(total, 1)
            if needed is not None:
                share = max(share, tokens / needed)
            self.report_progress(min(share, 1.0), f"reading {now.file.name}: {tokens:,} tokens")

        return report

    def report_bad_lines(self) -> None:
        """RegraftError for lines that cannot be read; with `skip_bad` a line on standard error."""
        bad = [part for part in self.used if part.journal.bad]
        count = sum(part.journal.bad for part in bad)

        # A cache that was filled with --skip-bad is used by runs without it, too.
        if bad and not self.text.skip_bad:
            raise RegraftError(
                f"{bad[0].journal.named[0]}: fix or remove it, or leave it out with --skip-bad"
            )

        # Caches are filled several times a run; only new bad lines are worth another message.
        if count > self.reported_bad_lines and distributed.is_rank0():
            named = [line for part in bad for line in part.journal.named]
            more = f"; and {count - 3:,} more" if count > 3 else ""
            print_line(f"left out {count:,} bad lines: {'; '.join(named[:3])}{more}")
        self.reported_bad_lines = count

    def rows(self, length: int, need: int = 0) -> CachedRows:
        """Rows of `length` tokens of this text.

        Which rows these are follows from the text and the arguments alone, whatever the caches hold
        already.

        Args:
            length: tokens of a row.
            need: tokens that will be trained on. So many are read, but at least
                `MIN_READ_TOKENS`; `max_tokens` of the text takes the place of both.

        RegraftError when the text has no document or less than one row.
        """
        budget = self.text.max_tokens
        if budget is None:
            budget = max(need, MIN_READ_TOKENS)
        max_rows = -(-budget // length) if budget else None  # 0: all there is
        bos = bos_token_id(self.tokenizer.tokenizer) if self.text.bos else None
        needed = None if max_rows is None else max_rows * length

        while True:
            available = self.fill_caches(needed)
            self.table = CachedRows(
                self.used, self.tokenizer, length, max_rows, self.text.overflow == "cut", bos
            )
            if needed is None or max_rows is None:
                break
            if available < needed or len(self.table) >= max_rows:
                break
            # overflow "cut" dropped tokens: read on for the rows that are missing, twice as much
            # since more will be dropped of that
            needed += 2 * (max_rows - len(self.table)) * length

        if not available:
            raise RegraftError(
                f"no text in '{self.text.path}': it holds no document with at least one word"
            )
        return check_not_empty(self.table, available)

    def facts(self) -> CorpusFacts:
        """What there is, what was read, what rows were made of it, what was left out."""
        journals = [part.journal for part in self.used]
        named = [line for journal in journals for line in journal.named]
        table = self.table

        complete = len(journals) == len(self.parts) and all(journal.done for journal in journals)

        return {
            "path": self.text.path,
            "files": len(self.parts),
            "file_bytes": sum(part.size for part in self.parts),
            "files_read": sum(journal.done for journal in journals),
            "complete": complete,
            "documents": sum(journal.documents for journal in journals),
            "text_bytes": sum(journal.bytes for journal in journals),
            "tokens": sum(journal.tokens for journal in journals),
            "rows": len(table) if table else 0,
            "row_tokens": table.tokens if table else 0,
            "cut_off_tokens": table.dropped_tokens if table else 0,
            "bad_lines": sum(journal.bad for journal in journals),
            "bad": named[:5],
        }


class TextMixture:
    """Rows of several texts in their shares: call it with a length, get a table of rows.

    Args:
        texts: what to read. Their shares need not add up to 1.
        tokenizer: a tokenizer of transformers.
        need: tokens of the largest training stage, over all texts.
        own: the run's folder for text. It pins the rows: a run that is resumed must get the rows
            it began with.
        cache: folder that keeps tokens for later runs. None: `own`, or a temporary folder where
            that is None, too.
        report_progress: called with the share that is read, 0 to 1, and a few words.

    RegraftError when there is no text, a share is not positive, a file cannot be read, or the text
    is not the one that was pinned.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        need: int = 0,
        own: Path | None = None,
        cache: Path | None = None,
        report_progress: Progress = lambda share, words: None,
    ):
        if not texts or any(text.share <= 0 for text in texts):
            raise RegraftError(
                f"no training text with a positive share in {[asdict(text) for text in texts]}"
            )
        for text in texts:
            if text.max_tokens is not None and text.max_tokens < 0:
                raise RegraftError(
                    f"max_tokens is {text.max_tokens} for '{text.path}': give 0 for all or more"
                )
            if text.max_line_bytes < 1:
                raise RegraftError(
                    f"max_line_bytes is {text.max_line_bytes} for '{text.path}': give 1 or more"
                )

        self.texts, self.need, self.own = texts, need, own
        self.corpora = [Corpus(text, tokenizer, cache or own, report_progress) for text in texts]
        self.tables: dict[int, CachedRows | MixedRows] = {}  # by length of a row

    def __call__(self, length: int) -> CachedRows | MixedRows:
        """Rows of `length` tokens; reads as much of the texts as they need."""
        if length not in self.tables:
            shares = [text.share for text in self.texts]
            needs = [int(self.need * share / sum(shares)) for share in shares]
            tables = [
                corpus.rows(length, need) for corpus, need in zip(self.corpora, needs, strict=True)
            ]
            self.tables[length] = mix_by_share(tables, shares)
            if self.own is not None:
                self.pin_rows(self.own / f"rows-{length}.json")
        return self.tables[length]

    def pin_rows(self, file: Path) -> None:
        """Write down which rows these are; RegraftError when the file names other ones."""
        tables = [corpus.table for corpus in self.corpora if corpus.table is not None]
        # Only what rows come from: the rest may grow or change while the run is stopped.
        files = [part.file.name for table in tables for part in table.used_caches]
        options = [
            [text.share, text.field, text.overflow, *(["bos"] if text.bos else [])]
            for text in self.texts
        ]
        now: PinnedRows = {
            "files": files,
            "tokens": [digest for table in tables for digest in table.part_digests],
            "options": options,
            "rows": [len(table) for table in tables],
        }

        before: PinnedRows | None = read_json_if_exists(file, PinnedRows)
        if before is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, now)
            return

        # The same text under another name is the same; a newer version may have added keys.
        if before | now | {"files": before.get("files")} != before:
            raise RegraftError(
                f"the text is not the one that this run began with ({_describe_change(before, now)}"
                "): give the same text, or start a new run"
            )

    def facts(self) -> list[CorpusFacts]:
        """What every text had, and what was read and used of it."""
        return [corpus.facts() for corpus in self.corpora]


def _describe_change(before: PinnedRows, now: PinnedRows) -> str:
    """The first file that differs between two pins, or what differs beside files."""
    tokens = zip(before.get("tokens", []), now["tokens"], strict=False)
    for number, (old, new) in enumerate(tokens):
        if old != new:
            name, earlier = now["files"][number], before["files"][number]
            return f"tokens of '{earlier}' were {old[:12]}, those of '{name}' are {new[:12]}"
    changed = {
        key: [before.get(key), value]
        for key, value in now.items()
        if key in ("options", "rows") and before.get(key) != value
    }
    return ", ".join(f"{key} were {old}, are {new}" for key, (old, new) in changed.items()) or (
        f"{len(before['files'])} files then, {len(now['files'])} now"
    )
