"""Which files a path or pattern means, and their bytes, decompressed."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

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
    opener = PACKED.get(file.suffix)
    return opener.open(file, "rb") if opener else file.open("rb")


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

    def lines(self, limit: int | None = None) -> Iterator[tuple[bytes, bool]]:
        """Lines with their line ends, each with whether it was read to its end.

        Args:
            limit: lines of more bytes come in parts. A part ends where a character ends; where
                does not depend on how many bytes came at a time.
        """
        held = bytearray()  # the start of a line whose end is not read yet
        while chunk := self.read_more():
            begin = 0
            while (end := chunk.find(b"\n", begin) + 1) > 0:
                held += chunk[begin:end]
                yield from self.take_parts(held, limit)
                yield bytes(held), True
                held.clear()
                begin = end

            held += chunk[begin:]
            yield from self.take_parts(held, limit)

        # a last line without a line end; where the file is damaged, it may be cut off
        if held:
            yield bytes(held), self.broken is None

    def take_parts(self, held: bytearray, limit: int | None) -> Iterator[tuple[bytes, bool]]:
        """Take parts from the front of `held` until no more than `limit` bytes are left."""
        while limit and len(held) > limit:
            cut = limit
            # Bytes 10xxxxxx continue a character of UTF-8, which has four bytes at most. A line end
            # alone would be a part that looks like an empty line.
            while cut > limit - 4 and (held[cut] & 0xC0 == 0x80 or held[cut] == ord("\n")):
                cut -= 1
            yield bytes(held[:cut]), True
            del held[:cut]

    def close(self) -> None:
        """Close the file."""
        self.raw.close()
