"""Documents of text files as a stream that can begin again anywhere; lines that cannot be read are named.

Lines are read here and not by `datasets`, whose streaming names neither file nor line of what it cannot read, takes a
line without the field for an empty one, and gets back to a place by reading all before it (tried with 5.2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from .files import CHUNK, LINES, TABLES, Stream, file_format

PIECE = 1 << 20  # characters: longer documents are handed on in pieces
NEAR = 4096  # characters before that in which to cut
NAMED = 5  # bad lines that are told; the others are counted
SEPARATOR = re.compile(r"\n[ \t]*\n[ \t]*\n\s*")  # two blank lines
BETWEEN = (
    re.compile(r"(?<=\w)(?= \w)"),
    re.compile(r"(?<=\S)(?=\S)"),
)  # where a document may be cut, the best first


@dataclass(frozen=True)
class ReadPosition:
    """Where reading goes on: bytes (parquet: rows) read of a file, lines of them, and what of that text is left over.

    `inside`: the text left over continues a document.
    """

    offset: int = 0
    line: int = 0
    held: str = ""
    begin: int = 0
    inside: bool = False

    def json(self) -> dict[str, Any]:
        """What `Place(**fields)` takes."""
        return asdict(replace(self, held=self.held[self.begin :], begin=0))


@dataclass(frozen=True)
class DocumentPiece:
    """A document or a part of one; `ends`: its last; `after`: the place behind it, None where none can begin."""

    text: str
    ends: bool
    after: ReadPosition | None


@dataclass
class BadLines:
    """Lines that could not be read: an error, or with `skip` a count and the first of them."""

    skip: bool = False
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, what: str, remedy: str = "fix or remove it") -> None:
        """One more; `what` names file and line and says what is wrong."""
        if not self.skip:
            raise RegraftError(f"{what}: {remedy}, or leave it out with --skip-bad")
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(what)


def read_pieces(
    file: Path, name: str, start: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    """Documents of a file from a place on, without blank ones; `name`: the field or column that holds the text.

    .txt: documents between two blank lines. RegraftError for what cannot be read, unless `bad` takes it.
    """
    if file_format(file) in TABLES:
        yield from _read_table(file, name, start, bad)
        return
    try:
        source = Stream(file, start.offset)
    except OSError as error:
        raise RegraftError(
            f"cannot read '{file}' ({error.strerror or error}): check the file and its rights"
        ) from error
    with closing(source):
        read = (
            _read_json_lines(source, file, name, start, bad)
            if file_format(file) in LINES
            else _read_plain_text(source, file, start, bad)
        )
        yield from read


def _read_json_lines(
    source: Stream, file: Path, name: str, start: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    offset, line = start.offset, start.line
    for raw, whole in source.lines():
        offset, line = offset + len(raw), line + 1
        if not whole or not raw.strip():
            continue
        where = f"'{file}' line {line}"
        try:
            row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            bad.add(
                f"{where} is not UTF-8 (byte {error.start})", "convert it first, e.g. with iconv"
            )
        except (ValueError, RecursionError) as error:
            bad.add(f"{where} is not JSON ({getattr(error, 'msg', error)})")
        else:
            value = row.get(name) if isinstance(row, dict) else None
            yield from _check_row(value, where, name, ReadPosition(offset, line), bad)
    _check_complete(source, file, line, bad)


def _check_row(
    value: Any, where: str, name: str, after: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    """A row's text in pieces; the place behind it comes with the last, since the row is read as a whole."""
    if not isinstance(value, str):
        bad.add(
            f"{where} has no string field '{name}'",
            "every line needs one (--field NAME for another)",
        )
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad.add(f"{where} holds half a character ({error.reason})")
        return
    if value.strip():
        *parts, rest = _split_text(value.strip("\n"))
        yield from (DocumentPiece(part, False, None) for part in parts)
        yield DocumentPiece(rest, True, after)


def _check_complete(source: Stream, file: Path, line: int, bad: BadLines) -> None:
    if source.broken is not None:
        bad.add(
            f"'{file}' cannot be read beyond line {line} ({source.broken or type(source.broken).__name__})",
            "fetch it again, it is cut off or damaged",
        )


def _split_text(text: str) -> list[str]:
    """A long text in pieces, cut before a space between two words, so that its tokens stay what they would be.

    The beginning of a text is cut as the whole text is.
    """
    parts = []
    while len(text.rstrip()) > PIECE:
        spots = (list(between.finditer(text, PIECE - NEAR, PIECE)) for between in BETWEEN)
        cut = next((found[-1].start() for found in spots if found), PIECE)
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def _decode_chunks(
    source: Stream, file: Path, start: ReadPosition, bad: BadLines
) -> Iterator[tuple[str, int, int]]:
    """(text, bytes and lines of the file up to its end) in chunks, line ends as `\\n`; bad lines are left out."""
    offset, line, held, size = start.offset, start.line, [], 0
    number = line + 1
    for raw, whole in source.lines(CHUNK):
        offset, size = offset + len(raw), size + len(raw)
        try:
            held.append(raw.decode())
        except UnicodeDecodeError as error:
            if whole:
                where = offset - len(raw) + error.start
                bad.add(
                    f"'{file}' line {number} is not UTF-8 (byte {where})",
                    "convert it first, e.g. with iconv",
                )
            else:  # the file ends within a character
                held.append(raw[: error.start].decode())
        line = number
        number += raw.endswith(b"\n")
        if size >= CHUNK:
            yield "".join(held).replace("\r\n", "\n").replace("\r", "\n"), offset, number - 1
            held, size = [], 0
    _check_complete(source, file, line, bad)
    yield "".join(held).replace("\r\n", "\n").replace("\r", "\n"), offset, number - 1


def _read_plain_text(
    source: Stream, file: Path, start: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    held, inside, place = start.held, start.inside, start
    for text, offset, line in _decode_chunks(source, file, start, bad):
        held, begin = held + text, 0
        while match := SEPARATOR.search(held, begin):
            if match.end() == len(
                held
            ):  # blank so far: the next document's first line may be further on
                held = held[: match.start()] + "\n\n\n"
                break
            after = ReadPosition(offset, line, held, match.end())
            yield from _split_document(held[begin : match.start()], inside, after)
            begin, inside = match.end(), False
        held = held[begin:]
        if (
            not inside and held.strip()
        ):  # while all is blank, its line ends may yet belong to a separator
            held = held.lstrip("\n")
        *parts, rest = _split_text(held)
        for part in parts:
            held, inside = held[len(part) :], True
            yield DocumentPiece(part, False, ReadPosition(offset, line, held, 0, True))
        place = ReadPosition(offset, line)
    yield from _split_document(held, inside, place)


def _split_document(text: str, inside: bool, after: ReadPosition) -> Iterator[DocumentPiece]:
    if inside or text.strip():
        text = text.rstrip("\n")
        *parts, rest = _split_text(text if inside else text.lstrip("\n"))
        yield from (DocumentPiece(part, False, None) for part in parts)
        yield DocumentPiece(rest, True, after)


def _read_table(
    file: Path, name: str, start: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"'{file}' needs {error.name}, which is not installed: pip install 'regraft[data]'"
        ) from error
    failures = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    form = file_format(file)[1:]
    try:
        table: Any = (
            parquet.ParquetFile(file)
            if form == "parquet"
            else ipc.open_stream(pyarrow.memory_map(str(file)))
        )
    except failures as error:
        bad.add(f"'{file}' is no readable {form} file ({_format_error(error)})", "write it again")
        return
    with closing(table):
        names = (table.schema_arrow if form == "parquet" else table.schema).names
        if name not in names:
            raise RegraftError(f"'{file}' has no column '{name}': choose --field of {names}")
        groups = (
            _row_groups(table, name, start.offset) if form == "parquet" else [(0, "the end", table)]
        )
        for number, last, batches in groups:
            try:
                for batch in batches:
                    column = batch.column(batch.schema.get_field_index(name))
                    past = min(max(0, start.offset - number), len(column))
                    number += past
                    for value in column[past:].to_pylist():
                        number += 1
                        yield from _check_row(
                            value, f"'{file}' row {number}", name, ReadPosition(number, number), bad
                        )
            except failures as error:
                bad.add(
                    f"'{file}' rows {number + 1} to {last} cannot be read ({_format_error(error)})",
                    "write it again",
                )


def _row_groups(table: Any, name: str, offset: int) -> Iterator[tuple[int, int, Any]]:
    """(rows before, rows up to its end, batches) of every row group of a parquet file that goes beyond `offset`."""
    row = 0
    for group in range(table.num_row_groups):
        first, row = row, row + table.metadata.row_group(group).num_rows
        if row > offset:
            yield first, row, table.iter_batches(batch_size=64, row_groups=[group], columns=[name])


def _format_error(error: Exception) -> str:
    return " ".join(str(error).split())
