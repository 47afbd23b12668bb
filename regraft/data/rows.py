"""Rows of tokens: in memory, and read by number from caches that stay on disk."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import RegraftError
from .token_cache import TokenCache
from .tokenizer import BatchTokenizer, count_bytes


@dataclass(frozen=True)
class Packed:
    """Rows of tokens in memory.

    Attributes:
        input_ids: (rows, length).
        position_ids: (rows, length), counted from the start of each document in a row.
        sizes: UTF-8 bytes of each row's text, (rows,), or a function from ids to that, which is
            called when they are needed.
        mask: the tokenizer's mask token, None when it has none.
        special: its tokens that stand for no text.
    """

    input_ids: Tensor
    position_ids: Tensor
    sizes: Tensor | Callable[[Tensor], Tensor]
    mask: int | None = None
    special: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: Any) -> Packed:
        return replace(
            self,
            input_ids=self.input_ids[rows],
            position_ids=self.position_ids[rows],
            sizes=self.sizes[rows] if isinstance(self.sizes, Tensor) else self.sizes,
        )

    @property
    def bytes(self) -> Tensor:
        """UTF-8 bytes of each row's text, (rows,)."""
        return self.sizes if isinstance(self.sizes, Tensor) else self.sizes(self.input_ids)

    @property
    def tokens(self) -> int:
        """How many tokens all rows have."""
        return self.input_ids.numel()

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.input_ids.shape[1]

    @property
    def largest(self) -> int:
        """The largest token id."""
        return int(self.input_ids.max())

    @property
    def device(self) -> torch.device:
        """The device that holds them."""
        return self.input_ids.device

    @cached_property
    def digest(self) -> str:
        """A hash of all rows: tokens and positions."""
        return hash_tensors(self.input_ids, self.position_ids)

    def to(self, device: torch.device) -> Packed:
        """The same rows on a device."""
        return replace(
            self, input_ids=self.input_ids.to(device), position_ids=self.position_ids.to(device)
        )

    def segments(self) -> Tensor | None:
        """Document number of every token, (rows, length); None when each row is one document."""
        restart = self.position_ids[:, 1:] != self.position_ids[:, :-1] + 1
        if not bool(restart.any()):
            return None
        return torch.nn.functional.pad(restart.long().cumsum(1), (1, 0))


class CachedRows:
    """Rows of tokens that stay on disk and are read by number.

    The caches count as one sequence of tokens, end to end; the last incomplete row is left out.

    Args:
        parts: the caches, in order. Their journals must not change any more.
        tokenizer: the one that made the tokens.
        length: tokens of a row.
        most: rows at most, None for all.
        cut: a document's rest that does not fit into its row is dropped, and the next row begins
            with the next document. Else the rest is carried into the next row, its positions
            restarting.
        bos: the token that takes the place of a document's first one in each row; None: none does.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        parts: Sequence[TokenCache],
        tokenizer: BatchTokenizer,
        length: int,
        most: int | None,
        cut: bool,
        bos: int | None = None,
    ):
        self.parts, self.tokenizer, self.length, self.bos = parts, tokenizer, length, bos
        # bounds[i]: the first token of part i, counted over all parts
        self.bounds = [0, *accumulate(part.journal.tokens for part in parts)]
        # (token ids, document ends) of the parts that were read from, by number
        self.arrays: dict[int, tuple[numpy.ndarray, numpy.ndarray]] = {}

        # With `cut`, where rows begin has to be looked up; else row n begins at n * length.
        self.begins = numpy.array(self._find_row_starts(most), "<i8") if cut else None
        count = self.bounds[-1] // length if self.begins is None else len(self.begins) - 1
        self.count = count if most is None else min(count, most)

    @property
    def largest(self) -> int:
        """The largest token id of the caches."""
        return max((part.journal.largest for part in self.parts), default=self.bos or 0)

    @property
    def tokens(self) -> int:
        """How many tokens all rows have."""
        return self.count * self.length

    @property
    def dropped_tokens(self) -> int:
        """Tokens that `cut` dropped before the last row's end."""
        return 0 if self.begins is None else int(self.begins[self.count]) - self.tokens

    @property
    def used_caches(self) -> list[TokenCache]:
        """The caches that rows come from. How far the caches are filled does not change these."""
        return [
            part for part, begin in zip(self.parts, self.bounds, strict=False) if begin < self.end
        ]

    @property
    def end(self) -> int:
        """The token behind the last row, counted over all parts."""
        last = self.count - 1
        return self.length + (last * self.length if self.begins is None else int(self.begins[last]))

    @cached_property
    def part_digests(self) -> list[str]:
        """A hash of what the rows take from each of `used_caches`: tokens, and where documents end.

        It is that of the text as it was tokenized, whatever its files are called, and of nothing
        that was read beyond the last row.
        """
        digests = []
        for number in range(len(self.used_caches)):
            tokens, ends = self._array(number)
            count = min(len(tokens), self.end - self.bounds[number])
            inside = ends[: numpy.searchsorted(ends, count, "left")]
            digest = hashlib.sha256(numpy.ascontiguousarray(tokens[:count]).data)
            digest.update(numpy.ascontiguousarray(inside).data)
            digests.append(digest.hexdigest())
        return digests

    @cached_property
    def digest(self) -> str:
        """A hash of all rows: those of the parts, and how rows are cut from them."""
        begins = None if self.begins is None else self.begins[: self.count].tolist()
        facts: list[Any] = [self.length, self.count, begins, self.part_digests]
        if self.bos is not None:
            facts.append(self.bos)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Any) -> Packed:
        numbers = row_numbers(rows, len(self))
        ids = numpy.empty((len(numbers), self.length), numpy.int64)
        positions = numpy.empty_like(ids)
        for into, number in enumerate(numbers):
            begin = int(self.begins[number]) if self.begins is not None else number * self.length
            self._read_row(begin, ids[into], positions[into])
        if self.bos is not None:
            ids[positions == 0] = self.bos

        tokenizer = self.tokenizer.tokenizer
        return Packed(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            # decoding every row costs more than reading it, and training does not ask for bytes
            partial(count_bytes, tokenizer=tokenizer),
            getattr(tokenizer, "mask_token_id", None),
            tuple(getattr(tokenizer, "all_special_ids", ())),
        )

    def _array(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(token ids (tokens,), document ends (documents,)) of a part."""
        if number not in self.arrays:
            part = self.parts[number]
            self.arrays[number] = part.array("tokens"), part.array("documents")[:, 0]
        return self.arrays[number]

    def _read_row(self, begin: int, ids: numpy.ndarray, positions: numpy.ndarray) -> None:
        """Write one row into `ids` and `positions`, (length,) each.

        Args:
            begin: the row's first token, counted over all parts.
            ids: gets the token ids.
            positions: gets the positions in their documents.
        """
        # Column in which a document begins, at that column; zeros elsewhere. Their running maximum
        # is the column in which each token's document begins.
        first = numpy.zeros(self.length, numpy.int64)
        filled, number = 0, bisect_right(self.bounds, begin) - 1
        while filled < self.length:
            tokens, ends = self._array(number)
            start = begin + filled - self.bounds[number]  # in this part
            stop = min(start + self.length - filled, len(tokens))
            ids[filled : filled + stop - start] = tokens[start:stop]
            self._check_ids(number, ids[filled : filled + stop - start])

            # Documents that end after the row's start and before its end: the next one begins
            # where they end. One that ends just at `start` or `stop` changes nothing here.
            inside = ends[
                numpy.searchsorted(ends, start, "right") : numpy.searchsorted(ends, stop, "left")
            ]
            columns = inside - start + filled
            first[columns] = columns

            filled += stop - start
            first[filled : filled + 1] = filled  # the next file begins a document
            number += 1
        numpy.subtract(numpy.arange(self.length), numpy.maximum.accumulate(first), out=positions)

    def _check_ids(self, number: int, ids: numpy.ndarray) -> None:
        """RegraftError when a cache holds an id that is larger than any it was built with."""
        part = self.parts[number]
        if len(ids) and int(ids.max()) > part.journal.largest:
            raise RegraftError(
                f"the token cache '{part.folder}' holds token {int(ids.max())}, its journal says"
                f" {part.journal.largest} at most: delete it"
            )

    def _find_row_starts(self, most: int | None) -> list[int]:
        """With `cut`: the first token of each row, and of the row that would follow the last."""
        starts, total = [0], self.bounds[-1]
        number = 0
        while starts[-1] + self.length <= total and (most is None or len(starts) <= most):
            last = starts[-1] + self.length - 1  # the row's last token
            while last >= self.bounds[number + 1]:
                number += 1

            # the next row begins where the document of this token ends
            ends = self._array(number)[1]
            at = numpy.searchsorted(ends, last - self.bounds[number], "right")
            # The document may go on beyond what was read so far: then nothing follows.
            starts.append(self.bounds[number] + int(ends[at]) if at < len(ends) else total)
        return starts


def hash_tensors(*tensors: Tensor) -> str:
    """A hash of tensors' shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def row_numbers(rows: Any, count: int) -> list[int]:
    """The row numbers that an index means.

    Args:
        rows: a slice, or whole numbers as a tensor or list; negative ones count from the end.
        count: how many rows there are. IndexError for a number beyond them.
    """
    if isinstance(rows, slice):
        return list(range(*rows.indices(count)))
    numbers = rows.reshape(-1).tolist() if isinstance(rows, Tensor) else list(rows)
    if wrong := [row for row in numbers if type(row) is not int or not -count <= row < count]:
        raise IndexError(f"no row {wrong[0]} among {count}")
    return [row % count for row in numbers]


class MixedRows:
    """Rows of several tables as one table, those of the first table first.

    Args:
        tables: where the rows are.
        picks: for each table the numbers of its rows that are taken, (taken,).
    """

    device = torch.device("cpu")

    def __init__(self, tables: Sequence[CachedRows], picks: Sequence[Tensor]):
        self.tables, self.picks = tables, picks
        self.bounds = [0, *accumulate(len(pick) for pick in picks)]
        self.length = tables[0].length

    @property
    def largest(self) -> int:
        """The largest token id of the tables."""
        return max(table.largest for table in self.tables)

    @property
    def tokens(self) -> int:
        """How many tokens all rows have."""
        return len(self) * self.length

    @cached_property
    def digest(self) -> str:
        """A hash of all rows: those of the tables, and which rows are taken."""
        facts = [[table.digest for table in self.tables], hash_tensors(*self.picks)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.bounds[-1]

    def __getitem__(self, rows: Any) -> Packed:
        numbers = row_numbers(rows, len(self))
        found = [self._row(number) for number in numbers] or [self.tables[0][:0]]
        ids = torch.cat([row.input_ids for row in found])
        positions = torch.cat([row.position_ids for row in found])
        return replace(found[0], input_ids=ids, position_ids=positions)

    def _row(self, number: int) -> Packed:
        """One row as a table of one, (1, length)."""
        table = bisect_right(self.bounds, number) - 1
        return self.tables[table][self.picks[table][number - self.bounds[table]]]


Table = Packed | CachedRows | MixedRows


def mix_by_share(tables: Sequence[CachedRows], shares: Sequence[float]) -> CachedRows | MixedRows:
    """The largest set of rows, none repeated, in which the shares hold.

    Args:
        tables: one a text. The rows taken of each are spread evenly over it.
        shares: positive numbers, one a table.
    """
    if len(tables) == 1:
        return tables[0]

    # The text that is shortest for its share decides how many rows there can be.
    scale = min(len(table) / share for table, share in zip(tables, shares, strict=True))
    picks = []
    for table, share in zip(tables, shares, strict=True):
        # Single precision tells so many rows apart, and runs in docs/log.md had their rows from it.
        exact = torch.float32 if len(table) < 1 << 20 else torch.float64
        count = max(1, int(scale * share))
        picks.append(torch.linspace(0, len(table) - 1, count, dtype=exact).round().long())
    return MixedRows(tables, picks)


def check_not_empty(table: CachedRows, tokens: int) -> CachedRows:
    """The table; RegraftError when it has no row.

    Args:
        table: what was made of a text.
        tokens: of that text, for the error.
    """
    if not len(table):
        raise RegraftError(
            f"the text has {tokens} tokens, less than one row of {table.length}: give more text or "
            "a shorter length"
        )
    return table
