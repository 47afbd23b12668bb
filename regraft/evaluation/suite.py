"""Benchmarks, recall and perplexity by position: read once, measured on any number of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import RegraftError
from . import lm_eval, positions, recall, tasks
from .perplexity import Candidate
from .rows import Averages, Difference, RecallScore, SuiteRow, TaskScore

LENGTHS = (512, 1024, 2048)  # context lengths of recall, in tokens
ITEMS = 32  # contexts of each kind and length of recall
Report = Callable[[float, str], None]  # (share done, what is being measured)
Row = TypeVar("Row", bound=SuiteRow)
Cell = TypeVar("Cell", TaskScore, RecallScore)


class Suite:
    """What to measure; call it with a candidate to get the candidate's row.

    Args:
        tokenizer: of all models that will be measured.
        names: benchmark tasks and kinds of recall.
        folder: where the tasks' files are.
        limit: questions of a task (None: all) and contexts of a cell of recall (None: `ITEMS`).
        shots: examples shown before a question.
        lengths: context lengths of recall, in tokens.
        filler: text that fills recall's contexts.
        documents: token ids (documents, length) whose perplexity by position is measured; None
            leaves it out.
        batch: rows read at a time; it changes no score.

    RegraftError for a name or file that is not there, or a length that does not fit: before a model
    is loaded.
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
        # last, so that a wrong name is reported before a missing package
        if self.questions:
            lm_eval.check_installed()

    def __call__(
        self, candidate: Candidate, report_progress: Report = lambda share, words: None
    ) -> SuiteRow:
        """Measure one model.

        Args:
            candidate: the model.
            report_progress: called with the share done, 0 to 1, and what is measured now.
        """
        steps = len(self.questions) + len(self.probes) + (self.documents is not None)
        row: SuiteRow = {}
        with candidate.within():
            if self.questions:
                row["tasks"] = self._score_tasks(candidate, report_progress, steps)
                means = averages(row["tasks"])
                row["average"] = means["average"]
                row["average_above_chance"] = means["average_above_chance"]

            for done, ((kind, length), probe) in enumerate(self.probes.items()):
                report_progress((len(self.questions) + done) / steps, f"{kind} at {length}")
                cells = row.setdefault("recall", {}).setdefault(kind, {})
                # JSON has no numbers as keys
                cells[str(length)] = recall.score(candidate.model, probe, self.batch)

            if self.documents is not None:
                report_progress(1 - 1 / steps, "perplexity by position")
                row["positions"] = positions.perplexity_by_position(candidate.model, self.documents)
        return row

    def _score_tasks(
        self, candidate: Candidate, report_progress: Report, steps: int
    ) -> dict[str, TaskScore]:
        """The benchmark tasks' scores by name; they are the first of all `steps`."""
        model = lm_eval.language_model(candidate, self.tokenizer, self.batch)
        scores = {}
        for done, (name, questions) in enumerate(self.questions.items()):
            report_progress(done / steps, name)
            scores[name] = lm_eval.score(model, tasks.TASKS[name], name, questions)
        return scores


def averages(rows: dict[str, TaskScore]) -> Averages:
    """Means over tasks: of each one's `metric`, and of its part above chance."""
    values = [cast(float, row[row["metric"]]) for row in rows.values()]
    return {
        "average": sum(values) / len(rows),
        "average_above_chance": sum(row["above_chance"] for row in rows.values()) / len(rows),
    }


def add_share_of_teacher(row: Row, teacher: SuiteRow) -> Row:
    """The row with `of_teacher` in every task and for the average.

    That is the model's score above chance as a share of the teacher's; None where the teacher is
    not above chance. A row without tasks stays as it is.
    """
    if "tasks" not in row:
        return row

    def share(own: float, other: float) -> float | None:
        return own / other if other > 0 else None

    scored: dict[str, TaskScore] = {}
    for name, task in row["tasks"].items():
        other = teacher["tasks"][name]
        of_teacher = share(task["above_chance"], other["above_chance"])
        scored[name] = {**task, "of_teacher": of_teacher}

    row = row.copy()
    row["tasks"] = scored
    row["of_teacher"] = share(row["average_above_chance"], teacher["average_above_chance"])
    return row


def add_difference(cell: Cell, own: Cell) -> Cell:
    """A score with how much higher the model's `own` is, question by question.

    Questions that both answer alike say nothing of a difference. So its standard error, which is
    that of paired differences, is smaller than that of either score.
    """
    own_each = torch.tensor(own["each"], dtype=torch.double)
    more = own_each - torch.tensor(cell["each"], dtype=torch.double)
    cell = cell.copy()
    cell["difference"] = {"mean": more.mean().item(), "stderr": recall.standard_error(more)}
    return cell


def add_differences(row: SuiteRow, own: SuiteRow) -> SuiteRow:
    """A baseline's row with `difference` in every task and cell of recall, and for the average.

    Args:
        row: of the baseline.
        own: the model's row, which has the same tasks and cells.
    """
    row = row.copy()  # equal baselines share one row

    if "tasks" in row:
        row["tasks"] = {
            name: add_difference(task, own["tasks"][name]) for name, task in row["tasks"].items()
        }
        row["difference"] = _average_difference(
            [task["difference"] for task in row["tasks"].values()]
        )

    if "recall" in row:
        row["recall"] = {
            kind: {
                length: add_difference(cell, own["recall"][kind][length])
                for length, cell in cells.items()
            }
            for kind, cells in row["recall"].items()
        }
    return row


def _average_difference(differences: list[Difference]) -> Difference:
    """The mean over tasks; their errors are independent, so the squares add up."""
    errors = [one["stderr"] for one in differences if one["stderr"] is not None]
    stderr = None
    if len(errors) == len(differences):
        stderr = math.hypot(*errors) / len(errors)
    return {"mean": sum(one["mean"] for one in differences) / len(differences), "stderr": stderr}
