"""Benchmarks, recall and perplexity by position: read once, then measured on any number of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RegraftError
from . import lm_eval, positions, recall, tasks
from .perplexity import Candidate

LENGTHS = (512, 1024, 2048)
ITEMS = 32
Tell = Callable[[float, str], None]


class Suite:
    """What to measure; calling it with a candidate gives the candidate's row.

    `names`: benchmark tasks, whose files lie in `folder`, and kinds of recall, asked at every one of `lengths` tokens
    in `filler` text; `limit`: questions of a task (None: all) and contexts of a kind (None: 32); `shots`: examples
    before a question; `documents`: (rows, length) whose perplexity by position is measured; `batch`: rows at a time,
    which changes no score. RegraftError for anything that is not there or does not fit, before a model is needed.
    """

    def __init__(
        self,
        tokenizer: Any,
        names: Sequence[str] = (),
        folder: str | Path | None = None,
        limit: int | None = None,
        shots: int = 0,
        lengths: Sequence[int] = LENGTHS,
        filler: Sequence[str] = (),
        documents: Tensor | None = None,
        batch: int = 8,
    ):
        if batch < 1 or shots < 0:
            raise RegraftError(
                f"--batch {batch} with --shots {shots}: ask for a batch of 1 and 0 shots at least"
            )
        self.tokenizer, self.batch, self.documents = tokenizer, batch, documents
        chosen = [tasks.check_task_name(name, list(recall.KINDS)) for name in dict.fromkeys(names)]
        benchmarks = [name for name in chosen if name in tasks.TASKS]
        if benchmarks and folder is None:
            raise RegraftError(
                f"no files for {', '.join(benchmarks)}: give their folder as --task-data DIR"
            )
        self.questions = {
            name: tasks.questions(name, folder or "", limit, shots) for name in benchmarks
        }
        items = ITEMS if limit is None else limit
        self.probes = {
            (kind, length): recall.build_probe(kind, tokenizer, filler, length, items)
            for kind in chosen
            if kind in recall.KINDS
            for length in lengths
        }
        if self.questions:
            lm_eval.check_installed()

    def __call__(
        self, candidate: Candidate, tell: Tell = lambda share, words: None
    ) -> dict[str, Any]:
        """`tasks` by name with `average` and `average_above_chance`, `recall` by kind and length, `positions`.

        A key is there when it was asked for. `tell` hears the share done and what is measured now.
        """
        steps = len(self.questions) + len(self.probes) + (self.documents is not None)
        row: dict[str, Any] = {}
        with candidate.within():
            if self.questions:
                model = lm_eval.language_model(candidate, self.tokenizer, self.batch)
                row["tasks"] = {}
                for done, (name, questions) in enumerate(self.questions.items()):
                    tell(done / steps, name)
                    row["tasks"][name] = lm_eval.score(model, tasks.TASKS[name], name, questions)
                row |= averages(row["tasks"])
            for done, ((kind, length), probe) in enumerate(self.probes.items()):
                tell((len(self.questions) + done) / steps, f"{kind} at {length}")
                cells = row.setdefault("recall", {}).setdefault(kind, {})
                cells[str(length)] = recall.score(candidate.model, probe, self.batch)
            if self.documents is not None:
                tell(1 - 1 / steps, "perplexity by position")
                row["positions"] = positions.perplexity_by_position(candidate.model, self.documents)
        return row


def averages(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean over tasks of each one's metric, and of its part above chance."""
    return {
        "average": sum(row[row["metric"]] for row in rows.values()) / len(rows),
        "average_above_chance": sum(row["above_chance"] for row in rows.values()) / len(rows),
    }


def add_share_of_teacher(row: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """The row with `of_teacher` in every task and for the average: what share of the teacher's part above chance it
    has, None where the teacher has none."""
    if "tasks" not in row:
        return row

    def share(own: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
        return own[key] / other[key] if other[key] > 0 else None

    scored = {
        name: task | {"of_teacher": share(task, teacher["tasks"][name], "above_chance")}
        for name, task in row["tasks"].items()
    }
    return row | {"tasks": scored, "of_teacher": share(row, teacher, "average_above_chance")}


def add_differences(row: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The row with `difference` in every task and kind of recall, and for the average of tasks: what the model's `own`
    row has more, as `mean` and `stderr`, which is that of differences question by question. Questions that both answer
    alike say nothing of a difference, so its error is smaller than that of either score."""

    def add_difference(cell: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
        more = torch.tensor(mine["each"], dtype=torch.double) - torch.tensor(
            cell["each"], dtype=torch.double
        )
        return cell | {
            "difference": {"mean": more.mean().item(), "stderr": recall.standard_error(more)}
        }

    row = dict(row)
    if "tasks" in row:
        row["tasks"] = {
            name: add_difference(task, own["tasks"][name]) for name, task in row["tasks"].items()
        }
        every = [task["difference"] for task in row["tasks"].values()]
        errors = [one["stderr"] for one in every]
        row["difference"] = {
            "mean": sum(one["mean"] for one in every) / len(every),
            "stderr": None if None in errors else math.hypot(*errors) / len(every),
        }
    if "recall" in row:
        row["recall"] = {
            kind: {
                length: add_difference(cell, own["recall"][kind][length])
                for length, cell in cells.items()
            }
            for kind, cells in row["recall"].items()
        }
    return row
