"""Benchmarks from jsonl files: where each task's file lies and how a line becomes a question."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegraftError

Row = Mapping[str, Any]
KINDS = {str: "a string", int: "a whole number", list: "a list of strings"}


@dataclass(frozen=True)
class Question:
    """What a model is asked: each of `choices` after `contexts`, one for all or one for each; `gold` is the right one.

    Without choices' alternatives (one choice, LAMBADA) a model is right when its greedy continuation is that choice.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int = 0

    @property
    def chance(self) -> float:
        """The share of right answers of a model that guesses."""
        return 1 / max(len(self.contexts), len(self.choices)) if self.alternatives else 0.0

    @property
    def alternatives(self) -> bool:
        """Whether there is something to choose from."""
        return len(self.contexts) > 1 or len(self.choices) > 1


@dataclass(frozen=True)
class Task:
    """`fields` of a line and their types; `ask` makes the question; `metric` is what averages and tables use.

    `files`: names looked for, `{}` the task's own; `shots`: the file of examples shown before a question, None where a
    task has none; `describe`: text before examples and question.
    """

    fields: Mapping[str, type]
    ask: Callable[[Row], Question]
    metric: str = "acc"
    files: tuple[str, ...] = ("{}.jsonl",)
    shots: str | None = None
    describe: Callable[[Row], str] = lambda row: ""


CHOICE: dict[str, type] = {"query": str, "choices": list, "gold": int}
PAIRS: dict[str, type] = {"context_options": list, "continuation": str, "gold": int}
SUBJECTS: dict[str, type] = {"subject": str, "question": str, "choices": list, "gold": int}


def multiple_choice(form: str) -> Callable[[Row], Question]:
    """Questions whose context is `form` with the line's query in it."""
    return lambda row: Question(
        (form.format(row["query"].strip()),), tuple(row["choices"]), row["gold"]
    )


def boolean(row: Row) -> Question:
    """Passage, question, "no" or "yes"."""
    return multiple_choice("{}\nAnswer:")({**row, "query": row["query"].removeprefix("Passage: ")})


def partial_evaluation(row: Row) -> Question:
    """The same continuation after two contexts: Trinh & Le's partial evaluation (arXiv 1806.02847)."""
    return Question(tuple(row["context_options"]), (row["continuation"],), row["gold"])


def letters(row: Row) -> Question:
    """Lettered choices in the context; the letter is the answer."""
    names = "ABCDEFGHIJ"[: len(row["choices"])]
    lines = "".join(
        f"{name}. {choice}\n" for name, choice in zip(names, row["choices"], strict=True)
    )
    return Question((f"{row['question'].strip()}\n{lines}Answer:",), tuple(names), row["gold"])


def cloze(row: Row) -> Question:
    """The choice's own words are the answer."""
    return multiple_choice("Question: {}\nAnswer:")({**row, "query": row["question"]})


def subject(kind: str) -> Callable[[Row], str]:
    """MMLU's first line."""
    words = f"The following are {kind} (with answers) about "
    return lambda row: words + row["subject"].replace("_", " ") + ".\n\n"


MMLU = functools.partial(
    Task, SUBJECTS, files=("mmlu/test.jsonl", "mmlu.jsonl"), shots="mmlu/dev.jsonl"
)
# Contexts and metrics as lm-evaluation-harness has them, so that its published numbers compare.
TASKS: dict[str, Task] = {
    "hellaswag": Task(CHOICE, multiple_choice("{}"), "acc_norm", ("{}.jsonl", "{}_val.jsonl")),
    "piqa": Task(CHOICE, multiple_choice("{}\nAnswer:")),
    "arc_easy": Task(CHOICE, multiple_choice("{}\nAnswer:")),
    "arc_challenge": Task(CHOICE, multiple_choice("{}\nAnswer:"), "acc_norm"),
    "winogrande": Task(PAIRS, partial_evaluation),
    "boolq": Task(CHOICE, boolean),
    "openbook_qa": Task(CHOICE, multiple_choice("{}"), "acc_norm"),
    "copa": Task(CHOICE, multiple_choice("{}")),
    "lambada": Task(
        {"context": str, "continuation": str},
        lambda row: Question((row["context"],), (row["continuation"],)),
    ),
    "mmlu": MMLU(letters, describe=subject("multiple choice questions")),
    "mmlu_cloze": MMLU(cloze, "acc_norm", describe=subject("questions")),
    "blimp": Task(
        {"good": str, "bad": str}, lambda row: Question(("",), (row["good"], row["bad"]))
    ),
}


def check_task_name(name: str, others: Sequence[str] = ()) -> str:
    """The name of a task, here or among `others`; RegraftError naming near matches and all that there are."""
    names = [*TASKS, *others]
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise RegraftError(f"unknown task '{name}': {hint}there are {', '.join(names)}")


def questions(
    name: str, folder: str | Path, limit: int | None = None, shots: int = 0
) -> list[Question]:
    """The questions of a task, `limit` of them spread evenly over the file, each after `shots` examples.

    The file is `folder`/NAME.jsonl or `folder`/NAME/NAME.jsonl, or as the task's `files` say. RegraftError on an
    unknown task, a missing or empty file, a line that does not fit, examples that there are not.
    """
    task = TASKS[check_task_name(name)]
    rows = read_rows(find_file(name, task.files, Path(folder)), task.fields)
    if limit is not None and limit < 1:
        raise RegraftError(f"--limit {limit} leaves no question: ask for one at least")
    count = min(limit or len(rows), len(rows))
    examples: dict[Any, list[Row]] = {}
    if shots:
        if task.shots is None:
            raise RegraftError(
                f"--shots {shots}: {name} has no file of examples; leave it out for this task"
            )
        for row in read_rows(find_file(name, (task.shots,), Path(folder)), task.fields):
            examples.setdefault(row.get("subject"), []).append(row)
    return [
        add_examples(row, task, examples.get(row.get("subject"), []), shots)
        for row in (rows[number * len(rows) // count] for number in range(count))
    ]


def add_examples(row: Row, task: Task, examples: Sequence[Row], shots: int) -> Question:
    """A line's question after the task's description and its first `shots` examples."""
    if len(examples) < shots:
        about = row.get("subject", "it")
        raise RegraftError(
            f"--shots {shots}: there are {len(examples)} examples for {about}; ask for no more"
        )
    asked = task.ask(row)
    shown = [task.ask(example) for example in examples[:shots]]
    before = task.describe(row) + "".join(f"{q.contexts[0]} {q.choices[q.gold]}\n\n" for q in shown)
    return Question(
        tuple(before + context for context in asked.contexts), asked.choices, asked.gold
    )


def find_file(name: str, files: Sequence[str], folder: Path) -> Path:
    """The first of a task's files that exists in the folder or in the task's own folder there."""
    named = [file.format(name) for file in files]
    places = [folder / part for file in named for part in dict.fromkeys((file, f"{name}/{file}"))]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(str(place) for place in places)
    raise RegraftError(
        f"no data for task {name}: looked for {looked}; give their folder as --task-data"
    )


def read_rows(file: Path, fields: Mapping[str, type]) -> list[Row]:
    """Checked lines of a jsonl file; lines end at "\\n" alone, since texts hold other line separators."""
    rows = []
    try:
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RegraftError(
            f"'{file}' is not UTF-8 (byte {error.start}): get the file again"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_row(line, fields, f"'{file}' line {number}"))
    if not rows:
        raise RegraftError(f"'{file}' holds no question: get the file again")
    return rows


def parse_row(line: str, fields: Mapping[str, type], place: str) -> Row:
    """One line as a mapping with the right fields; RegraftError naming file and line otherwise."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RegraftError(
            f"{place} is not JSON ({error.msg}): is the file cut short? Get it again"
        ) from error
    for name, kind in fields.items():
        value: Any = row.get(name) if isinstance(row, dict) else None
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if kind is list and fits:
            fits = len(value) > 1 and all(isinstance(item, str) and item for item in value)
        if not fits:
            raise RegraftError(
                f"{place} has no field '{name}' that is {KINDS[kind]} (it is {value!r})"
            )
    many = next((len(row[name]) for name, kind in fields.items() if kind is list), None)
    if many is not None and not 0 <= row["gold"] < many:
        raise RegraftError(
            f"{place}: gold is {row['gold']}, but there are {many} choices, counted from 0"
        )
    return row
