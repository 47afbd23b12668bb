"""Texts to tables of rows: caches filled as far as they are needed, by as many processes as there are."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .. import distributed
from ..errors import RegraftError
from ..io.files import write_json
from .files import find_files
from .rows import CachedRows, MixedRows, check_not_empty, mix_by_share
from .token_cache import TokenCache
from .tokenizer import BatchTokenizer

MIN_READ_TOKENS = (
    1 << 24
)  # tokens that are read of a text when fewer are needed: order is by seed over all of these
WAIT = 0.2  # seconds between looks at what another process is reading
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Text:
    """Training text: a file (.txt, .jsonl, .parquet, also compressed), a pattern or a folder; its share of the rows.

    `field`: the key or column that holds the text. `long`: a document longer than its row is carried on in the next or
    cut. `skip_bad`: lines that cannot be read are left out and counted. `read`: tokens to read at most, 0 for all
    (None: what the stages train on, and at least 16.8 million).
    """

    path: str
    share: float = 1.0
    field: str = "text"
    overflow: Literal["carry", "cut"] = "carry"
    skip_bad: bool = False
    max_tokens: int | None = None


class Corpus:
    """The caches of one text's files, below `cache` (None: a folder that goes with this object)."""

    def __init__(
        self,
        text: Text,
        tokenizer: Any,
        cache: Path | None = None,
        tell: Tell = lambda share, words: None,
    ):
        self.text, self.tokens, self.tell = text, BatchTokenizer(tokenizer), tell
        if cache is None:
            cache = Path(tempfile.mkdtemp(prefix="regraft-text-"))
            weakref.finalize(
                self.tokens, shutil.rmtree, cache, ignore_errors=True
            )  # every table holds these
        root = cache / self.tokens.name
        self.parts = [
            TokenCache(root, file, text.field, self.tokens) for file in find_files(text.path)
        ]
        self.used: list[TokenCache] = []
        self.table: CachedRows | None = None
        self.said = 0

    def fill_caches(self, wanted: int | None) -> int:
        """Make sure that the caches hold the text's first `wanted` tokens, or all there are; how many they hold.

        Every process begins with another file and takes no file that another is reading. RegraftError for a bad line
        unless the text says to skip them.
        """
        while window := self.find_unread_files(wanted):
            turn = distributed.rank() % len(window)
            if not any(
                part.fill(more, self.text.skip_bad, self.progress_callback(wanted))
                for part, more in window[turn:] + window[:turn]
            ):
                time.sleep(WAIT)
        self.used = []
        held = 0
        for part in self.parts:
            if wanted is None or held < wanted:
                self.used.append(part)
                held += part.journal.tokens
        self.report_bad_lines()
        return held

    def find_unread_files(self, wanted: int | None) -> list[tuple[TokenCache, int | None]]:
        """The next files to read, at most one a process, and how many tokens of each are enough (None: all)."""
        held = 0
        window: list[tuple[TokenCache, int | None]] = []
        for part in self.parts:
            more = None if wanted is None else wanted - held
            if (more is not None and more <= 0) or len(window) == distributed.world_size():
                break
            known = part.read_journal()
            if not known.done and (more is None or known.tokens < more):
                window.append((part, more))
            held += known.tokens
        return window

    def progress_callback(self, wanted: int | None) -> Callable[[TokenCache], None]:
        """Says how much of the text is read, in tokens where it is known how many are wanted."""
        whole = sum(part.size for part in self.parts)

        def report_progress(now: TokenCache) -> None:
            tokens = sum(part.journal.tokens for part in self.parts)
            size = sum(part.size * (part.journal.done or part is now) for part in self.parts)
            share = (
                size / max(whole, 1)
                if wanted is None
                else max(size / max(whole, 1), tokens / wanted)
            )
            self.tell(min(share, 1.0), f"reading {now.file.name}: {tokens:,} tokens")

        return report_progress

    def report_bad_lines(self) -> None:
        """RegraftError, or with `skip_bad` a line on standard error, for lines that cannot be read."""
        bad = [part for part in self.used if part.journal.bad]
        count = sum(part.journal.bad for part in bad)
        if bad and not self.text.skip_bad:
            raise RegraftError(
                f"{bad[0].journal.named[0]}: fix or remove it, or leave it out with --skip-bad"
            )
        if count > self.said and distributed.is_rank0():
            named = [line for part in bad for line in part.journal.named]
            more = f"; and {count - 3:,} more" if count > 3 else ""
            print(
                f"regraft: left out {count:,} bad lines: {'; '.join(named[:3])}{more}",
                file=sys.stderr,
            )
        self.said = count

    def rows(self, length: int, need: int = 0) -> CachedRows:
        """Rows of `length` tokens, as many as `need` tokens are, at least FLOOR's, or what the text has.

        They follow from the text and these numbers alone, whatever the caches hold already.
        """
        asked = max(need, MIN_READ_TOKENS) if self.text.max_tokens is None else self.text.max_tokens
        most = -(-asked // length) if asked else None
        wanted = None if most is None else most * length
        while True:
            held = self.fill_caches(wanted)
            self.table = CachedRows(
                self.used, self.tokens, length, most, self.text.overflow == "cut"
            )
            if wanted is None or most is None or held < wanted or len(self.table) >= most:
                break
            wanted += 2 * (most - len(self.table)) * length  # what was cut off is made up for
        if not held:
            raise RegraftError(
                f"no text in '{self.text.path}': it holds no document with at least one word"
            )
        return check_not_empty(self.table, held)

    def facts(self) -> dict[str, Any]:
        """What there is, what was read, what rows were made of it, what was left out."""
        known = [part.journal for part in self.used]
        named = [line for journal in known for line in journal.named]
        table = self.table
        return {
            "path": self.text.path,
            "files": len(self.parts),
            "file_bytes": sum(part.size for part in self.parts),
            "files_read": sum(journal.done for journal in known),
            "complete": len(known) == len(self.parts) and all(journal.done for journal in known),
            "documents": sum(journal.documents for journal in known),
            "text_bytes": sum(journal.bytes for journal in known),
            "tokens": sum(journal.tokens for journal in known),
            "rows": len(table) if table else 0,
            "row_tokens": table.tokens if table else 0,
            "cut_off_tokens": table.dropped_tokens if table else 0,
            "bad_lines": sum(journal.bad for journal in known),
            "bad": named[:5],
        }


class TextMixture:
    """Rows by length of several texts in their shares; tokenised once.

    `need`: tokens of the largest stage. `own`: the run's folder for text, which pins the rows: a run that goes on has
    the rows it began with. Tokens are kept there, or in `cache`, or without both as long as this object. RegraftError
    when there is no text, a share is not positive, a file cannot be read, or the text is not the one that was pinned.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        need: int = 0,
        own: Path | None = None,
        cache: Path | None = None,
        tell: Tell = lambda share, words: None,
    ):
        if not texts or any(text.share <= 0 for text in texts):
            raise RegraftError(
                f"no training text with a positive share in {[asdict(text) for text in texts]}"
            )
        if wrong := [text for text in texts if text.max_tokens is not None and text.max_tokens < 0]:
            raise RegraftError(
                f"read is {wrong[0].max_tokens} tokens of '{wrong[0].path}': give 0 for all or more"
            )
        self.texts, self.need, self.own = texts, need, own
        self.corpora = [Corpus(text, tokenizer, cache or own, tell) for text in texts]
        self.tables: dict[int, CachedRows | MixedRows] = {}

    def __call__(self, length: int) -> CachedRows | MixedRows:
        """Rows of `length` tokens; texts are read as far as they are needed for them."""
        if length not in self.tables:
            shares = [text.share for text in self.texts]
            parts = [int(self.need * share / sum(shares)) for share in shares]
            made = [
                corpus.rows(length, part) for corpus, part in zip(self.corpora, parts, strict=True)
            ]
            self.tables[length] = mix_by_share(made, shares)
            if self.own is not None:
                self.pin_rows(self.own / f"rows-{length}.json")
        return self.tables[length]

    def pin_rows(self, file: Path) -> None:
        """Note which rows these are; RegraftError when other ones were noted."""
        tables = [corpus.table for corpus in self.corpora if corpus.table is not None]
        files = [
            f"{part.file.name}, {part.size:,} bytes"
            for table in tables
            for part in table.used_caches
        ]
        options = [[text.share, text.field, text.overflow] for text in self.texts]
        now = {"files": files, "options": options, "rows": [len(table) for table in tables]}
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, now)
            return
        if before != now:
            pairs = zip(before["files"], files, strict=False)
            what = next(
                (f"'{old}' then, '{new}' now" for old, new in pairs if old != new),
                f"{before} then, {now} now",
            )
            raise RegraftError(
                f"the text is not the one that this run began with ({what}): give that, or begin anew"
            )

    def facts(self) -> list[dict[str, Any]]:
        """What every text had, what was read and used of it; see `Corpus.facts`."""
        return [corpus.facts() for corpus in self.corpora]
