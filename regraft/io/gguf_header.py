"""The header of a GGUF file, checked before a library reads it.

The libraries believe the counts in a header, and read lists that are longer than the file without
end. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import RegraftError
from .schema import shorten

# The struct codes of plain values by their number in a file.
PLAIN = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Names of keys and tensors have at most 65,535 bytes; a chat template or a list of tokens some MB.
NAME_BYTES, HEADER_BYTES = 65_535, 100_000_000
DIMENSIONS = 4  # of a tensor, at most
MAX_NESTING = 4  # of lists in lists; files have lists of plain values


class GGUFHeader:
    """Reads a header once from front to back; RegraftError where it does not fit the file.

    Attributes:
        values: the plain values by key; lists are read over.
        tensors: how many tensors there are.
    """

    def __init__(self, file: Path, stream: BinaryIO):
        """Read the header.

        Args:
            file: the file's name, for errors.
            stream: the open file.
        """
        self.file, self.stream = file, stream
        self.order = "<"
        self.size = min(file.stat().st_size, HEADER_BYTES)
        self.values: dict[str, Any] = {}

        self.take(4)  # the magic number, which `gguf.find_gguf_file` has seen
        version = self.number("I")
        if version & 65535 == 0:  # written on a big-endian machine
            self.order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            self.refuse(f"has version {version}, not 2 or 3")
        self.tensors, keys = self.number("Q"), self.number("Q")
        for _ in range(self.count(keys, 12)):
            key = self.string(NAME_BYTES)
            self.values[key] = self.value(self.number("I"), 0)
        for _ in range(self.count(self.tensors, 24)):
            name, dimensions = self.string(NAME_BYTES), self.number("I")
            if dimensions > DIMENSIONS:
                self.refuse(f"has {dimensions} dimensions for tensor {shorten(name)}")
            self.take(8 * dimensions + 12)  # sizes, type and offset

    def check_counts(self) -> None:
        """RegraftError when a key counts more layers than there are tensors."""
        for key, value in self.values.items():
            fits = type(value) is int and 0 <= value <= self.tensors
            if key.endswith(".block_count") and not fits:
                self.refuse(f"has {key} = {shorten(value)} for {self.tensors} tensors")

    def refuse(self, problem: str) -> NoReturn:
        """Raise a RegraftError."""
        raise RegraftError(f"the header of '{self.file}' {problem}: fetch the file again")

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > self.size - self.stream.tell():
            self.refuse(f"is cut short, or has more than {HEADER_BYTES:,} bytes")
        return self.stream.read(size)

    def number(self, code: str) -> Any:
        """The next number of a `struct` code."""
        return struct.unpack(self.order + code, self.take(struct.calcsize("=" + code)))[0]

    def count(self, number: int, size: int) -> int:
        """The number; refused when the file has no room for so many things of `size` bytes."""
        if number * size > self.size - self.stream.tell():
            self.refuse(f"counts {number:,} entries, which the file has no room for")
        return number

    def string(self, limit: int) -> str:
        """The next string, of at most `limit` bytes."""
        size = self.number("Q")
        if size > limit:
            self.refuse(f"has a string of {size:,} bytes")
        return self.take(size).decode("utf-8", "replace")

    def value(self, kind: int, nesting: int) -> Any:
        """The next value of a kind; None for a list."""
        if kind in PLAIN:
            return self.number(PLAIN[kind])
        if kind == STRING:
            return self.string(HEADER_BYTES)
        if kind != ARRAY or nesting == MAX_NESTING:
            self.refuse(f"has a value of kind {kind} at byte {self.stream.tell()}")

        inner, length = self.number("I"), self.number("Q")
        if inner in PLAIN:
            self.take(self.count(length, 1) * struct.calcsize("=" + PLAIN[inner]))
        else:
            for _ in range(self.count(length, 8)):
                self.value(inner, nesting + 1)
        return None


def check_header(file: Path) -> None:
    """RegraftError when the header of a GGUF file is damaged or counts what cannot be there."""
    with open(file, "rb") as stream:
        GGUFHeader(file, stream).check_counts()
