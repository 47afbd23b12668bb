"""The setting that names a training text. Light on purpose: reading a recipe imports no PyTorch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

# Corpora have documents of some MB a line, the longest books some 10 MB; text8 is 100 MB without a
# line end.
MAX_LINE_BYTES = 128_000_000


@dataclass(frozen=True)
class Text:
    """Training text: a file (.txt, .jsonl, .parquet, also compressed), a pattern or a folder.

    Attributes:
        path: file, glob pattern, folder, or several of these with commas between.
        share: this text's part of all rows, relative to the shares of the other texts.
        field: the key (.jsonl) or column (.parquet, .arrow) that holds the text.
        overflow: what happens to the part of a document that does not fit into its row:
            "carry" puts it into the next row, "cut" drops it.
        skip_bad: leave out lines that cannot be read, and count them, instead of stopping.
        max_tokens: tokens to read at most, 0 for all. None: as many as the stages train on, and
            at least `corpus.MIN_READ_TOKENS`.
        bos: every document, and what a row carries on of one, begins with the tokenizer's BOS
            token, in the place of its first token.
        max_line_bytes: bytes that a line of .txt or .jsonl, or a cell of a table, may have. One is
            in memory as a whole; a longer one is a line that cannot be read.
    """

    path: str
    share: float = 1.0
    field: str = "text"
    overflow: Literal["carry", "cut"] = "carry"
    skip_bad: bool = False
    max_tokens: int | None = None
    bos: bool = False
    # Not in the representation: a run that a long line stopped may go on with a higher limit.
    max_line_bytes: int = dataclasses.field(default=MAX_LINE_BYTES, repr=False)
