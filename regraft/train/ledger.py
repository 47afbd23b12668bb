"""The ledger of a run: tokens, FLOPs and seconds of everything that was paid for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COSTS = ("tokens", "flops", "seconds")  # what a row of a ledger counts


def stage_name(row: Mapping[str, Any]) -> str:
    """Number from one and kind of a metrics row's stage."""
    return f"{row['stage'] + 1} {row['kind']}"


def build_ledger(
    metrics: Iterable[Mapping[str, Any]], start: Iterable[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """One row for what came before training and for every stage, and their sum.

    Args:
        metrics: rows of metrics.jsonl, whose costs are running totals of their stage.
        start: rows of what came before training, such as the closed form; each has a `kind` and its costs.
    """
    before = [{"stage": row["kind"], **{key: row[key] for key in COSTS}} for row in start]

    last: dict[str, dict[str, Any]] = {}
    for row in metrics:
        if "loss" in row:
            last[stage_name(row)] = {"stage": stage_name(row), **{key: row[key] for key in COSTS}}

    rows = [*before, *last.values()]
    if not rows:
        return []
    return [*rows, {"stage": "total"} | {key: sum(row[key] for row in rows) for key in COSTS}]
