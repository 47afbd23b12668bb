"""What speed measurements cost: which of them fit a time limit, and speeds at contexts that do not.

A step of decoding takes a + b L seconds behind L tokens, reading L tokens c L^e.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from .rows import BenchRow

Level = Literal["all", "decode", "nothing"]
# Before two contexts were measured:
GROWTH = 1.3  # e
SLOPE = 0.25  # of a decoding step's seconds that grow with the context


class TimeLimit:
    """Chooses what is measured at each context length.

    Args:
        seconds: for all of it, None for no limit.
        steps: decoding steps of a row.
        models: how many are measured at each length.
    """

    def __init__(self, seconds: float | None, steps: int, models: int):
        self.seconds, self.steps, self.models = seconds, steps, models
        self.begin = time.monotonic()

    def choose(self, rows: Mapping[str, Sequence[BenchRow]], length: int, left: int) -> Level:
        """Whether a length is read and decoded, only decoded, or left out.

        Args:
            rows: measured so far, by model, from short to long.
            length: the next, in tokens.
            left: lengths that are left, this one among them.
        """
        measured = [row for found in rows.values() for row in found]
        if self.seconds is None or not measured:
            return "all"
        spent = time.monotonic() - self.begin
        timed = sum(self._row_seconds(row) for row in measured)
        loading = max(spent - timed, 0.0) / len(measured)  # of a process with its model

        some = [found for found in rows.values() if _points(found, "decode_tok_s")]
        steps = sum(decode_seconds(found, length) * (self.steps + 1) for found in some)
        decoded = self.models * loading + steps
        read = sum(prefill_seconds(found, length) for found in some)
        if spent + read + left * decoded <= self.seconds:
            return "all"
        return "decode" if spent + decoded <= self.seconds else "nothing"

    def _row_seconds(self, row: BenchRow) -> float:
        speeds = {"decode_tok_s": self.steps + 1, "prefill_tok_s": row["length"]}
        return sum(
            row["batch"] * tokens / speed
            for key, tokens in speeds.items()
            if (speed := row[key]) and key not in row["extrapolated"]  # type: ignore[literal-required]
        )


def extrapolate(row: BenchRow, shorter: Sequence[BenchRow]) -> BenchRow:
    """A row whose missing speeds follow from two shorter contexts at least, where there are two.

    Args:
        row: what was measured.
        shorter: rows of the same model at shorter contexts.
    """
    row = row.copy()
    tokens = row["batch"] * row["length"]
    if row["decode_tok_s"] is None and len(_points(shorter, "decode_tok_s")) > 1:
        row["decode_tok_s"] = row["batch"] / decode_seconds(shorter, row["length"])
        row["extrapolated"] = [*row["extrapolated"], "decode_tok_s"]
    if row["prefill_tok_s"] is None and len(_points(shorter, "prefill_tok_s")) > 1:
        row["prefill_tok_s"] = tokens / prefill_seconds(shorter, row["length"])
        row["extrapolated"] = [*row["extrapolated"], "prefill_tok_s"]
    return row


def decode_seconds(rows: Sequence[BenchRow], length: int) -> float:
    """Seconds of a decoding step behind `length` tokens, a line through the last two points."""
    points = [(at, batch / speed) for at, batch, speed in _points(rows, "decode_tok_s")]
    (near, last), before = points[-1], points[-2:-1]
    if not before:
        return last * (1 + SLOPE * (length / near - 1))
    (far, first) = before[0]
    slope = max((last - first) / (near - far), 0.0)
    return last + slope * (length - near)


def prefill_seconds(rows: Sequence[BenchRow], length: int) -> float:
    """Seconds to read `length` tokens, a power law through the last two points."""
    points = [(at, batch * at / speed) for at, batch, speed in _points(rows, "prefill_tok_s")]
    if not points:
        return 0.0
    (near, last), before = points[-1], points[-2:-1]
    growth = GROWTH
    if before:
        (far, first) = before[0]
        growth = min(max(math.log(last / first) / math.log(near / far), 1.0), 2.0)
    return last * float(length / near) ** growth


def _points(rows: Sequence[BenchRow], key: str) -> list[tuple[int, int, float]]:
    """(length, batch, speed) of the rows in which a speed was measured."""
    return [
        (row["length"], row["batch"], row[key])  # type: ignore[literal-required]
        for row in rows
        if row[key] and key not in row["extrapolated"]  # type: ignore[literal-required]
    ]
