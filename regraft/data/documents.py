"""Documents of text files as a stream that can begin again anywhere.

Lines are read here and not by `datasets`, whose streaming names neither file nor line of what it
cannot read, takes a line without the field for an empty one, and returns to a position by reading
everything before it (tried with 5.2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from ..errors import RegraftError, explain_errors
from ..io.files import JSON_PARTS
from .files import CHUNK, LINES, TABLES, Stream, file_format
from .text import MAX_LINE_BYTES

PIECE = 1 << 20  # characters: longer documents come in pieces
NEAR = 4096  # characters before the end of a piece in which a good place to cut is looked for
NAMED = 5  # bad lines that are named; the others are only counted
MAX_RATIO = 200  # of the bytes of a column to those on disk; text has 3 to 20
LINE_REMEDY = "split it, or raise the limit with --max-line-bytes"
SEPARATOR = re.compile(r"\n[ \t]*\n[ \t]*\n\s*")  # two blank lines
# Blanks are held back until it is known what follows. Of more than so many, the rest is dropped.
LONG_BLANK = re.compile(rf"(\s{{{PIECE}}})\s+")
# Where a document may be cut, the best first: before a space that follows a word, which leaves the
# tokens of most tokenizers as they are; between any two characters that are no blanks.
BETWEEN = (re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=\S)(?=\S)"))


class PositionFields(TypedDict):
    """The fields of a `ReadPosition` in JSON."""

    offset: int
    line: int
    held: str
    begin: int
    inside: bool
    past: NotRequired[int]


@dataclass(frozen=True)
class ReadPosition:
    """Where in a file reading continues.

    Attributes:
        offset: bytes (of tables: rows) of the file that are read; of a compressed file,
            decompressed bytes.
        line: lines (of tables: rows) up to there, for error messages.
        held: text that is read and not yet handed on.
        begin: where in `held` the rest begins. Positions within one chunk share its text.
        inside: whether that rest continues a document.
        past: bytes before `offset` of the line that it is in.
    """

    offset: int = 0
    line: int = 0
    held: str = ""
    begin: int = 0
    inside: bool = False
    past: int = 0

    def json(self) -> PositionFields:
        """The fields, `held` without what lies before `begin`."""
        fields = asdict(replace(self, held=self.held[self.begin :], begin=0))
        if not self.past:  # which is so but in lines of some MB
            del fields["past"]
        return cast(PositionFields, fields)


@dataclass(frozen=True)
class DocumentPiece:
    """A document or a part of one.

    Attributes:
        text: of the piece.
        ends: whether this is the document's last piece.
        after: where reading continues behind it; None where it cannot begin again there.
    """

    text: str
    ends: bool
    after: ReadPosition | None


@dataclass
class BadLines:
    """What happens with lines that cannot be read: an error, or with `skip` a count.

    Attributes:
        skip: leave them out.
        count: how many there were.
        named: the first `NAMED` of them: file, line and what is wrong.
    """

    skip: bool = False
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, what: str, remedy: str = "fix or remove it") -> None:
        """Count one more; RegraftError unless they are skipped.

        Args:
            what: file and line, and what is wrong with it.
            remedy: what the user can do, for the error.
        """
        if not self.skip:
            raise RegraftError(f"{what}: {remedy}, or leave it out with --skip-bad")
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(what)


def read_pieces(
    file: Path, name: str, start: ReadPosition, bad: BadLines, most: int = MAX_LINE_BYTES
) -> Iterator[DocumentPiece]:
    """Documents of a file from a position on, without blank ones.

    Args:
        file: in one of the formats of `files`. In .txt, two blank lines separate documents.
        name: the key or column that holds the text, in the other formats.
        start: where to begin; `ReadPosition()` is the start of the file.
        bad: gets each line that cannot be read.
        most: bytes that a line, or a cell of a table, may have.

    RegraftError for a file that cannot be opened or has no such column, and from `bad`.
    """
    if file_format(file) in TABLES:
        yield from _read_table(file, name, start, bad, most)
        return

    with explain_errors(f"cannot read '{file}'", "check the file and its rights"):
        source = Stream(file, start.offset)
    with closing(source):
        if file_format(file) in LINES:
            yield from _read_json_lines(source, file, name, start, bad, most)
        else:
            yield from _read_plain_text(source, file, start, bad, most)


def _read_json_lines(
    source: Stream, file: Path, name: str, start: ReadPosition, bad: BadLines, most: int
) -> Iterator[DocumentPiece]:
    offset, line = start.offset, start.line
    for raw, complete, over in source.lines(most):
        first, where = line == 0, f"'{file}' line {line + 1}"
        ends = raw.count(b"\n")
        offset, line = offset + len(raw), line + (ends if over else max(1, ends))
        if over == 1:
            bad.add(f"{where} {_too_long(most)}", LINE_REMEDY)
        # A line that a damaged file cut off is reported once, by _check_complete.
        if over or not complete or not raw.strip():
            continue

        try:
            row = _parse_row(raw, first)
        except UnicodeDecodeError as error:
            bad.add(
                f"{where} is not UTF-8 (byte {error.start})", "convert it first, e.g. with iconv"
            )
        except (ValueError, RecursionError) as error:  # too many brackets exhaust the stack
            bad.add(f"{where} is not JSON ({getattr(error, 'msg', error)})")
        else:
            value = row.get(name) if isinstance(row, dict) else None
            yield from _check_row(value, where, name, ReadPosition(offset, line), bad)

    _check_complete(source, file, line, bad)


def _parse_row(raw: bytes, first: bool) -> Any:
    """The JSON value of a line; ValueError where it is none, or takes far more memory than text."""
    parts = raw.count(b"[") + raw.count(b"{")
    if parts > JSON_PARTS:
        raise ValueError(f"it has {parts:,} brackets, the limit is {JSON_PARTS:,}")
    # "utf-8-sig" drops the byte order mark that some editors put before the first line
    return json.loads(raw.decode("utf-8-sig" if first else "utf-8"))


def _too_long(most: int) -> str:
    """What is wrong with a line over the limit."""
    return f"has more than {most:,} bytes"


def _check_row(
    value: Any, where: str, name: str, after: ReadPosition, bad: BadLines
) -> Iterator[DocumentPiece]:
    """The text of one line or table row in pieces, or a bad line.

    Only the last piece has a position behind it: reading can begin again between rows alone.
    """
    if not isinstance(value, str):
        bad.add(
            f"{where} has no string field '{name}'",
            "every line needs one (--field NAME for another)",
        )
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no character
        bad.add(f"{where} holds half a character ({error.reason})")
        return

    if value.strip():
        *parts, rest = _split_text(value.strip("\n"))
        yield from (DocumentPiece(part, False, None) for part in parts)
        yield DocumentPiece(rest, True, after)


def _check_complete(source: Stream, file: Path, line: int, bad: BadLines) -> None:
    """Report a compressed file that ended before its end."""
    if source.broken is not None:
        why = source.broken or type(source.broken).__name__
        bad.add(
            f"'{file}' cannot be read beyond line {line} ({why})",
            "fetch it again, it is cut off or damaged",
        )


def _split_text(text: str) -> list[str]:
    """A long text in pieces of at most `PIECE` characters, cut where `BETWEEN` allows it.

    The start of a text is cut as the whole text is, so that pieces do not depend on how much of it
    was read at a time.
    """
    parts, begin, end = [], 0, len(text.rstrip())
    while end - begin > PIECE:
        cut = begin + PIECE
        for between in BETWEEN:
            if places := list(between.finditer(text, cut - NEAR, cut)):
                cut = places[-1].start()
                break
        parts.append(text[begin:cut])
        begin = cut
    return [*parts, text[begin:]]


def _decode_chunks(
    source: Stream, file: Path, start: ReadPosition, bad: BadLines, most: int
) -> Iterator[tuple[str, ReadPosition]]:
    """Text of whole lines in chunks, line ends as `\\n`; bad lines are left out.

    Returns (text, the position behind it).
    """
    offset, line = start.offset, start.line
    number = line + 1  # of the line that is being read, which may come in parts
    held: list[str] = []
    size = 0  # bytes in the chunk
    past = start.past
    for raw, complete, over in source.lines(most, CHUNK, past):
        offset, past = offset + len(raw), 0 if raw.endswith(b"\n") else past + len(raw)
        if over:
            if over == 1:
                bad.add(f"'{file}' line {number} {_too_long(most)}", LINE_REMEDY)
            line, number = number, number + raw.count(b"\n")
            continue
        size += len(raw)
        try:
            held.append(raw.decode())
        except UnicodeDecodeError as error:
            if complete:
                where = offset - len(raw) + error.start
                bad.add(
                    f"'{file}' line {number} is not UTF-8 (byte {where})",
                    "convert it first, e.g. with iconv",
                )
            else:  # a damaged file ends within a character, which _check_complete reports
                held.append(raw[: error.start].decode())
        line = number
        number += raw.count(b"\n")

        if size >= CHUNK:
            yield _with_plain_line_ends(held), ReadPosition(offset, number - 1, past=past)
            held, size = [], 0

    _check_complete(source, file, line, bad)
    yield _with_plain_line_ends(held), ReadPosition(offset, number - 1, past=past)


def _with_plain_line_ends(parts: list[str]) -> str:
    return "".join(parts).replace("\r\n", "\n").replace("\r", "\n")


def _read_plain_text(
    source: Stream, file: Path, start: ReadPosition, bad: BadLines, most: int
) -> Iterator[DocumentPiece]:
    """Documents between two blank lines; the text of a chunk that ends none is held for the next.

    The documents must not depend on where chunks end. So text is held back as long as what follows
    may change how it is split.
    """
    held, inside, position = start.held, start.inside, start
    for text, place in _decode_chunks(source, file, start, bad, most):
        held, begin = LONG_BLANK.sub(r"\1", held + text), 0
        while match := SEPARATOR.search(held, begin):
            if match.end() == len(held):
                # All blank so far: the separator may go on in the next chunk. A short one in its
                # place keeps the held text from growing with the blanks of a file.
                held = held[: match.start()] + "\n\n\n"
                break
            after = replace(place, held=held, begin=match.end())
            yield from _split_document(held[begin : match.start()], inside, after)
            begin, inside = match.end(), False
        held = held[begin:]

        # Line ends before a document do not belong to it. While all is blank they stay, since they
        # may yet be part of a separator.
        if not inside and held.strip():
            held = held.lstrip("\n")
        *parts, _ = _split_text(held)
        for part in parts:
            held, inside = held[len(part) :], True
            yield DocumentPiece(part, False, replace(place, held=held, inside=True))
        position = place

    yield from _split_document(held, inside, position)


def _split_document(text: str, inside: bool, after: ReadPosition) -> Iterator[DocumentPiece]:
    """A document that is read to its end, in pieces; nothing where it is blank.

    Args:
        text: the document, or its rest when `inside`.
        inside: whether pieces of it were handed on before: then an empty last piece is needed.
        after: the position behind it.
    """
    if inside or text.strip():
        text = text.rstrip("\n")
        *parts, rest = _split_text(text if inside else text.lstrip("\n"))
        yield from (DocumentPiece(part, False, None) for part in parts)
        yield DocumentPiece(rest, True, after)


def _read_table(
    file: Path, name: str, start: ReadPosition, bad: BadLines, most: int
) -> Iterator[DocumentPiece]:
    """Documents of a .parquet or .arrow file; positions count rows."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"'{file}' needs {error.name}, which is not installed: pip install 'regraft[data]'"
        ) from error
    # Libraries behind pyarrow raise more than its own exceptions on a damaged file.
    failures = (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError, TypeError)
    is_parquet = file_format(file) == ".parquet"

    table: Any
    try:
        if is_parquet:
            table = parquet.ParquetFile(file)
            leaves = [table.schema.column(n).path for n in range(len(table.schema))]
            # As a dictionary, a cell that is repeated is in memory once.
            if name in leaves:
                table = parquet.ParquetFile(file, metadata=table.metadata, read_dictionary=[name])
        else:
            table = ipc.open_stream(pyarrow.memory_map(str(file)))
    except failures as error:
        form = file_format(file)[1:]
        bad.add(f"'{file}' is no readable {form} file ({_format_error(error)})", "write it again")
        return

    with closing(table):
        names = (table.schema_arrow if is_parquet else table.schema).names
        if name not in names:
            raise RegraftError(f"'{file}' has no column '{name}': choose --field of {names}")

        # Row groups of .parquet are read apart: where one is damaged, the next can still be read.
        groups: Iterable[tuple[int, Any, Any]] = [(0, "the end", table)]
        if is_parquet:
            groups = _row_groups(table, name, start.offset, 2 * most)
        for number, last, batches in groups:
            try:
                for batch in batches:
                    column = batch.column(batch.schema.get_field_index(name))
                    # Offsets beyond the file would be read as they are, and end the process.
                    column.validate(full=True)
                    past = min(max(0, start.offset - number), len(column))  # read before
                    number += past
                    for cell in column[past:]:
                        number += 1
                        where, position = f"'{file}' row {number}", ReadPosition(number, number)
                        if _cell_bytes(cell) > most:
                            bad.add(f"{where} {_too_long(most)}", LINE_REMEDY)
                            continue
                        yield from _check_row(cell.as_py(), where, name, position, bad)
            except failures as error:
                bad.add(
                    f"'{file}' rows {number + 1} to {last} cannot be read ({_format_error(error)})",
                    "write it again",
                )


def _cell_bytes(cell: Any) -> int:
    """Bytes of a cell of text; 0 for other types."""
    text = cell if hasattr(cell, "as_buffer") else getattr(cell, "value", None)  # of a dictionary
    buffer = text.as_buffer() if text is not None and hasattr(text, "as_buffer") else None
    return 0 if buffer is None else int(buffer.size)


def _row_groups(
    table: Any, name: str, offset: int, room: int
) -> Iterator[tuple[int, int, Iterator[Any]]]:
    """(rows before, rows up to its end, batches) of each row group that goes beyond `offset`.

    Args:
        table: a file of pyarrow.
        name: the column.
        offset: rows that are read.
        room: bytes that a column of a row group may always have.
    """

    def read_batches(group: int, columns: list[Any]) -> Iterator[Any]:
        size = sum(column.total_uncompressed_size for column in columns)
        if size > max(room, MAX_RATIO * sum(column.total_compressed_size for column in columns)):
            raise ValueError(f"{size:,} bytes that are compressed more than {MAX_RATIO} to 1")
        yield from table.iter_batches(batch_size=64, row_groups=[group], columns=[name])

    row = 0
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        first, row = row, row + facts.num_rows
        columns = [facts.column(n) for n in range(facts.num_columns)]
        own = [column for column in columns if column.path_in_schema.split(".")[0] == name]
        if row > offset:
            yield first, row, read_batches(group, own)


def _format_error(error: Exception) -> str:
    return " ".join(str(error).split())
