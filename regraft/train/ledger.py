"""The ledger of a run: tokens, FLOPs and seconds of everything that was paid for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..io.files import read_json_if_exists
from .records import Cost, StartCost

COSTS = ("tokens", "flops", "seconds")  # what a row of a ledger counts


class LedgerRow(Cost):
    """What one stage of a run cost, or what came before training, or all of it."""

    stage: str  # "1 align", the kind of what came before, or "total"


class LedgerFile(TypedDict, total=False):
    """What is read back of `ledger.json`."""

    start: list[StartCost]  # what came before training


def read_start_costs(folder: Path) -> list[StartCost]:
    """What was spent before training, from a run's ledger.json; empty without one."""
    known: LedgerFile | None = read_json_if_exists(folder / "ledger.json", LedgerFile)
    return known.get("start", []) if known else []


def sum_costs(rows: Iterable[Mapping[str, Any]]) -> Cost:
    """Tokens, FLOPs and seconds of all rows together."""
    rows = list(rows)
    return {
        "tokens": sum(row["tokens"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def stage_name(row: Mapping[str, Any]) -> str:
    """Number from one and kind of a metrics row's stage, such as "1 align"."""
    return f"{row['stage'] + 1} {row['kind']}"


def build_ledger(
    metrics: Iterable[Mapping[str, Any]], start: Iterable[Mapping[str, Any]] = ()
) -> list[LedgerRow]:
    """One row for what came before training and for every stage, and their sum.

    Args:
        metrics: rows of metrics.jsonl, whose costs are running totals of their stage.
        start: rows of what came before training, such as the closed form; each has a `kind` and
            its costs.
    """
    before = [build_ledger_row(row["kind"], row) for row in start]

    # Costs are running totals: the last row of a stage holds all of it.
    last: dict[str, LedgerRow] = {}
    for row in metrics:
        if "loss" in row:  # held-out evaluations cost nothing
            last[stage_name(row)] = build_ledger_row(stage_name(row), row)

    rows = [*before, *last.values()]
    return [*rows, build_ledger_row("total", sum_costs(rows))] if rows else []


def build_ledger_row(stage: str, costs: Mapping[str, Any]) -> LedgerRow:
    """The row of a stage with the costs of a larger row."""
    return {
        "stage": stage,
        "tokens": costs["tokens"],
        "flops": costs["flops"],
        "seconds": costs["seconds"],
    }
