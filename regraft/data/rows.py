"""Rows of tokens: in memory, and read by number from caches that stay on disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    """Token rows: input_ids and position_ids (rows, length); `sizes`: UTF-8 bytes of each row's text, (rows,), or what
    counts them when they are asked for.

    `mask`: the tokenizer's mask token, None when it has none; `special`: its tokens that stand for no text.
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
        """How many tokens there are."""
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
        """Where they are."""
        return self.input_ids.device

    def to(self, device: torch.device) -> Packed:
        """The same rows on a device."""
        return replace(
            self, input_ids=self.input_ids.to(device), position_ids=self.position_ids.to(device)
        )

    def segments(self) -> Tensor | None:
        """Document index of every token (rows, length), None when each row is one document."""
        restart = self.position_ids[:, 1:] != self.position_ids[:, :-1] + 1
        return (
            torch.nn.functional.pad(restart.long().cumsum(1), (1, 0))
            if bool(restart.any())
            else None
        )


class CachedRows:
    """Rows of `length` tokens of caches end to end, read when they are asked for; at most `most` rows.

    The last incomplete row is left out. With `cut`, a document's rest that does not fit into its row is dropped and the
    next row begins with the next document; else it goes on in the next row, its positions restarting.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        parts: Sequence[TokenCache],
        tokens: BatchTokenizer,
        length: int,
        most: int | None,
        cut: bool,
    ):
        self.parts, self.source, self.length = parts, tokens, length
        self.bounds = [0, *accumulate(part.journal.tokens for part in parts)]
        self.arrays: dict[
            int, tuple[numpy.ndarray, numpy.ndarray]
        ] = {}  # of the parts that were read from
        self.begins = numpy.array(self._find_row_starts(most), "<i8") if cut else None
        count = self.bounds[-1] // length if self.begins is None else len(self.begins) - 1
        self.count = count if most is None else min(count, most)

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max((part.journal.largest for part in self.parts), default=0)

    @property
    def tokens(self) -> int:
        """How many tokens the rows have."""
        return self.count * self.length

    @property
    def dropped_tokens(self) -> int:
        """Tokens that were cut off documents before the last row's end."""
        return 0 if self.begins is None else int(self.begins[self.count]) - self.tokens

    @property
    def used_caches(self) -> list[TokenCache]:
        """The parts that the rows are of: these do not depend on how far the caches are filled."""
        last = self.count - 1
        end = self.length + (last * self.length if self.begins is None else int(self.begins[last]))
        return [part for part, begin in zip(self.parts, self.bounds, strict=False) if begin < end]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Any) -> Packed:
        numbers = row_numbers(rows, len(self))
        ids = numpy.empty((len(numbers), self.length), numpy.int64)
        positions = numpy.empty_like(ids)
        for into, number in enumerate(numbers):
            begin = int(self.begins[number]) if self.begins is not None else number * self.length
            self._read_row(begin, ids[into], positions[into])
        tokenizer = self.source.tokenizer
        mask, special = (
            getattr(tokenizer, "mask_token_id", None),
            getattr(tokenizer, "all_special_ids", ()),
        )
        counted = partial(count_bytes, tokenizer=tokenizer)
        return Packed(
            torch.from_numpy(ids), torch.from_numpy(positions), counted, mask, tuple(special)
        )

    def _array(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        if number not in self.arrays:
            part = self.parts[number]
            self.arrays[number] = part.array("tokens"), part.array("documents")[:, 0]
        return self.arrays[number]

    def _read_row(self, begin: int, ids: numpy.ndarray, positions: numpy.ndarray) -> None:
        """One row: ids and positions (length,)."""
        first = numpy.zeros(
            self.length, numpy.int64
        )  # where the token's document begins in the row
        filled, number = 0, bisect_right(self.bounds, begin) - 1
        while filled < self.length:
            tokens, ends = self._array(number)
            start = begin + filled - self.bounds[number]
            stop = min(start + self.length - filled, len(tokens))
            ids[filled : filled + stop - start] = tokens[start:stop]
            inside = ends[
                numpy.searchsorted(ends, start, "right") : numpy.searchsorted(ends, stop, "left")
            ]
            columns = inside - start + filled
            first[columns] = columns
            filled += stop - start
            first[filled : filled + 1] = filled  # a file ends its document
            number += 1
        numpy.subtract(numpy.arange(self.length), numpy.maximum.accumulate(first), out=positions)

    def _find_row_starts(self, most: int | None) -> list[int]:
        """First token of each row and of the one that would follow."""
        found, total = [0], self.bounds[-1]
        number = 0
        while found[-1] + self.length <= total and (most is None or len(found) <= most):
            last = found[-1] + self.length - 1
            while last >= self.bounds[number + 1]:
                number += 1
            ends = self._array(number)[1]
            at = numpy.searchsorted(ends, last - self.bounds[number], "right")
            # The document may go on beyond what was read so far: then nothing follows.
            found.append(self.bounds[number] + int(ends[at]) if at < len(ends) else total)
        return found


def row_numbers(rows: Any, count: int) -> list[int]:
    """Row numbers that an index means: a slice, a tensor or a list of whole numbers; negative ones from the end."""
    if isinstance(rows, slice):
        return list(range(*rows.indices(count)))
    numbers = rows.reshape(-1).tolist() if isinstance(rows, Tensor) else list(rows)
    if wrong := [row for row in numbers if type(row) is not int or not -count <= row < count]:
        raise IndexError(f"no row {wrong[0]} among {count}")
    return [row % count for row in numbers]


class MixedRows:
    """Rows of several tables, `picks` the numbers of each that are taken, (n,); the first table's come first."""

    device = torch.device("cpu")

    def __init__(self, tables: Sequence[CachedRows], picks: Sequence[Tensor]):
        self.tables, self.picks = tables, picks
        self.bounds = [0, *accumulate(len(pick) for pick in picks)]
        self.length = tables[0].length

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(table.largest for table in self.tables)

    @property
    def tokens(self) -> int:
        """How many tokens the rows have."""
        return len(self) * self.length

    def __len__(self) -> int:
        return self.bounds[-1]

    def __getitem__(self, rows: Any) -> Packed:
        numbers = row_numbers(rows, len(self))
        found = [self._row(number) for number in numbers] or [self.tables[0][:0]]
        ids, positions = (
            torch.cat([getattr(row, name) for row in found])
            for name in ("input_ids", "position_ids")
        )
        return replace(found[0], input_ids=ids, position_ids=positions)

    def _row(self, number: int) -> Packed:
        table = bisect_right(self.bounds, number) - 1
        return self.tables[table][self.picks[table][number - self.bounds[table]]]


Table = Packed | CachedRows | MixedRows


def mix_by_share(tables: Sequence[CachedRows], shares: Sequence[float]) -> CachedRows | MixedRows:
    """The largest set of rows, none repeated, in which the shares hold, each table's spread evenly over it."""
    if len(tables) == 1:
        return tables[0]
    scale = min(len(table) / share for table, share in zip(tables, shares, strict=True))
    picks = []
    for table, share in zip(tables, shares, strict=True):
        # Single precision tells so many rows apart, and is what took the rows of runs that are on record.
        exact = torch.float32 if len(table) < 1 << 20 else torch.float64
        count = max(1, int(scale * share))
        picks.append(torch.linspace(0, len(table) - 1, count, dtype=exact).round().long())
    return MixedRows(tables, picks)


def check_not_empty(table: CachedRows, tokens: int) -> CachedRows:
    """The table; RegraftError when it has not one row, of text of so many tokens."""
    if not len(table):
        raise RegraftError(
            f"the text has {tokens} tokens, less than one row of {table.length}: give more text or a shorter length"
        )
    return table
