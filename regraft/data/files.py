"""Which files a path or pattern means, and their bytes, decompressed."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import RegraftError
from ..io.files import check_regular_file

PACKED = {".gz": gzip, ".xz": lzma, ".zst": None, ".bz2": bz2}
LINES = (".jsonl", ".json")
KINDS = (".txt", *LINES)
TABLES = (".parquet", ".arrow")
KNOWN = (
    ".txt, .jsonl or .json, also compressed (.gz, .xz, .zst, .bz2), .parquet, "
    "or .arrow as datasets saves it"
)
CHUNK = 1 << 20  # bytes read at once
XZ_MEMORY = 256 << 20  # bytes for decompressing .xz; its largest preset, -9, takes 65 MB
BLANK_LINES = re.compile(rb"[ \t\r\n]*\n")


class LinePart(NamedTuple):
    """A line of a file, some blank lines, or a part of a long line.

    Attributes:
        raw: the bytes, with the line's end.
        complete: whether it was read to its end; False where the file is damaged there.
        over: 1 for the part with which a line exceeds the limit, 2 for what follows in that line.
    """

    raw: bytes
    complete: bool = True
    over: int = 0


def file_format(file: Path) -> str:
    """The suffix that says how a file is read, without compression; empty for unknown ones.

    `.txt`, `.jsonl`, `.json`, `.parquet` or `.arrow`: that of `a.jsonl.gz` is `.jsonl`.
    """
    if file.suffix in TABLES:
        return file.suffix
    inner = Path(file.stem).suffix if file.suffix in PACKED else file.suffix
    return inner if inner in KINDS else ""


def list_text_files(folder: Path) -> list[Path]:
    """Text files of a folder and its subfolders, sorted.

    Without bare .json files, which in a folder are rather somebody's settings.
    """
    return sorted(
        file
        for file in folder.rglob("*")
        if file_format(file) and file.suffix != ".json" and file.is_file()
    )


def find_files(path: str | Path) -> list[Path]:
    """The text files that a path means, none twice.

    Args:
        path: a file, a pattern such as `data/*.jsonl.zst`, a folder, or several of these with
            commas between. Their order is kept; files of a pattern or folder are sorted.

    RegraftError when there is no file, or one whose name does not say that it is text.
    """
    place = Path(path)
    if place.is_dir():
        files = list_text_files(place)
        if not files:
            raise RegraftError(f"no text in '{path}': it holds no file that ends in {KNOWN}")
        return files

    # A name that exists is taken as it is, even with `*` or a comma in it.
    if place.exists():
        files = [place]
    elif matches := sorted(glob.glob(str(path), recursive=True)):
        files = []
        for match in map(Path, matches):
            files += list_text_files(match) if match.is_dir() else [match]
    elif "," in str(path):
        files = [file for part in str(path).split(",") for file in find_files(part.strip())]
    else:
        raise RegraftError(
            f"no text at '{path}': give a file that ends in {KNOWN}, a pattern, or a folder "
            "of these"
        )

    for file in files:
        check_regular_file(file)
        if not file_format(file):
            raise RegraftError(f"cannot read '{file}' as text: its name must end in {KNOWN}")
    return list(dict.fromkeys(files))


def import_zstd() -> Any:
    """The module that reads .zst: Python's own from 3.14 on, else its backport.

    The older `zstandard` package does not say when a file ends too early. RegraftError when the
    module is not installed.
    """
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"a .zst file needs {name}, which is not installed: pip install 'regraft[data]'"
        ) from error


def open_decompressed(file: Path) -> BinaryIO:
    """Open a file that may be compressed; its bytes are read decompressed."""
    if file.suffix == ".zst":
        return import_zstd().open(file, "rb")
    if file.suffix == ".xz":
        return cast(BinaryIO, XzStream(file))
    opener = PACKED.get(file.suffix)
    return opener.open(file, "rb") if opener else file.open("rb")


class XzStream:
    """Decompressed bytes of an .xz file in a bounded memory, which `lzma.open` does not offer."""

    def __init__(self, file: Path):
        self.raw = file.open("rb")
        self.decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        self.packed = b""  # read and not yet given to the decoder

    def read1(self, size: int) -> bytes:
        """Some bytes, at most `size`; nothing at the end. EOFError when it comes too early."""
        while True:
            if self.decoder.eof:
                # Another stream may follow, after zeros that fill up four bytes.
                self.packed = (self.decoder.unused_data + self.packed).lstrip(b"\0")
                self.packed = self.packed or self.raw.read(CHUNK).lstrip(b"\0")
                if not self.packed:
                    return b""
                self.decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            elif self.decoder.needs_input and not self.packed:
                self.packed = self.raw.read(CHUNK)
                if not self.packed:
                    raise EOFError("Compressed file ended before the end-of-stream marker")

            given, self.packed = self.packed, b""
            if data := self.decoder.decompress(given, size):
                return data

    def close(self) -> None:
        """Close the file."""
        self.raw.close()


class Stream:
    """Decompressed bytes of a file from an offset on.

    Args:
        file: may be compressed.
        offset: decompressed bytes to skip. Those of a compressed file are read and thrown away.

    Attributes:
        broken: why the bytes ended before the file's end, None as long as they did not.
    """

    def __init__(self, file: Path, offset: int = 0):
        self.broken: Exception | None = None
        failures: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
        self.failures = (*failures, import_zstd().ZstdError) if file.suffix == ".zst" else failures
        self.raw: Any = open_decompressed(file)
        if file.suffix not in PACKED:
            self.raw.seek(offset)
        else:
            while offset > 0 and (chunk := self.read_more(min(CHUNK, offset))):
                offset -= len(chunk)

    def read_more(self, size: int | None = None) -> bytes:
        """Read one byte or more, at most `size` (None: a chunk); nothing at the end."""
        try:
            return self.raw.read1(size or CHUNK)
        except self.failures as error:
            self.broken = error
            return b""

    def lines(self, most: int, limit: int | None = None, size: int = 0) -> Iterator[LinePart]:
        """Lines with their line ends, blank ones several at a time.

        Args:
            most: bytes that a line may have. What goes beyond is handed on in parts that are marked
                `over`, as soon as it is read, so that nothing piles up.
            limit: lines of more bytes come in parts. A part ends where a character ends; where
                does not depend on how many bytes came at a time.
            size: bytes before the stream's start of the line that it begins in.
        """
        held = bytearray()  # the start of a line, or of its next part, whose end is not read yet
        while chunk := self.read_more():
            begin = 0
            while (end := find_line_end(chunk, begin, not held and not size)) > 0:
                blank = chunk.count(b"\n", begin, end) > 1
                held += chunk[begin:end]
                for part in () if blank else take_parts(held, size, most, limit):
                    size += len(part.raw)
                    yield part
                yield LinePart(bytes(held), True, 0 if blank else count_over(size, len(held), most))
                held.clear()
                begin, size = end, 0

            held += chunk[begin:]
            for part in take_parts(held, size, most, limit):
                size += len(part.raw)
                yield part

        # a last line without a line end; where the file is damaged, it may be cut off
        if held:
            over = count_over(size, len(held), most)
            yield LinePart(bytes(held), self.broken is None, over)

    def close(self) -> None:
        """Close the file."""
        self.raw.close()


def find_line_end(chunk: bytes, begin: int, fresh: bool) -> int:
    """Behind the line, or behind all blank lines, that begin at a place; 0 when none ends.

    Args:
        chunk: what was read.
        begin: where to begin in it.
        fresh: whether a line begins there.
    """
    blank = BLANK_LINES.match(chunk, begin) if fresh else None
    return blank.end() if blank else chunk.find(b"\n", begin) + 1


def count_over(before: int, size: int, most: int) -> int:
    """`LinePart.over` of `size` bytes of a line that has `before` bytes before them."""
    if before + size <= most:
        return 0
    return 1 if before <= most else 2


def take_parts(held: bytearray, size: int, most: int, limit: int | None) -> Iterator[LinePart]:
    """Take parts from the front of `held` until no more than `limit` bytes are left.

    Args:
        held: a line, or a part of it.
        size: bytes of the line before it.
        most: see `Stream.lines`; what goes beyond is taken whole.
        limit: see `Stream.lines`.
    """
    while limit and len(held) > limit:
        cut = limit
        # Bytes 10xxxxxx continue a character of UTF-8, which has four bytes at most. A line end
        # alone would be a part that looks like an empty line.
        while cut > limit - 4 and (held[cut] & 0xC0 == 0x80 or held[cut] == ord("\n")):
            cut -= 1
        yield LinePart(bytes(held[:cut]), True, count_over(size, cut, most))
        size += cut
        del held[:cut]

    if size + len(held) > most and not held.endswith(b"\n"):
        yield LinePart(bytes(held), True, count_over(size, len(held), most))
        held.clear()
