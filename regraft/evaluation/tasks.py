"""Benchmarks from .jsonl files: where each task's file is and how a line becomes a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegraftError, suggest
from ..io.files import parse_json
from .rows import Metric

Row = Mapping[str, Any]  # a line of a task's file; the task says which fields it has
KINDS = {str: "a string", int: "a whole number", list: "a list of strings"}


@dataclass(frozen=True)
class Question:
    """What a model is asked: which of several choices follows a context.

    With several contexts and one choice, which of the contexts the choice follows. With one of each
    (LAMBADA) there is no alternative: a model is right when its greedy continuation is the choice.

    Attributes:
        contexts: text before a choice, one for all choices or one for each.
        choices: possible continuations.
        gold: number of the right choice (or context), from 0.
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
    """A benchmark: its files, and how a line becomes a question.

    Attributes:
        fields: of a line, with their types.
        ask: makes the question of a line.
        metric: the one that averages and tables use.
        files: names of the file that are looked for, `{}` standing for the task's name.
        shots: file of the examples that are shown before a question; None where a task has none.
        describe: makes the text before examples and question.
    """

    fields: Mapping[str, type]
    ask: Callable[[Row], Question]
    metric: Metric = "acc"
    files: tuple[str, ...] = ("{}.jsonl",)
    shots: str | None = None
    describe: Callable[[Row], str] = lambda row: ""


CHOICE: dict[str, type] = {"query": str, "choices": list, "gold": int}
PAIRS: dict[str, type] = {"context_options": list, "continuation": str, "gold": int}
SUBJECTS: dict[str, type] = {"subject": str, "question": str, "choices": list, "gold": int}


def multiple_choice(form: str) -> Callable[[Row], Question]:
    """Makes questions whose context is `form` with the line's query in place of `{}`."""
    return lambda row: Question(
        (form.format(row["query"].strip()),), tuple(row["choices"]), row["gold"]
    )


def boolean(row: Row) -> Question:
    """BoolQ: passage and question, answered "no" or "yes"."""
    return multiple_choice("{}\nAnswer:")({**row, "query": row["query"].removeprefix("Passage: ")})


def partial_evaluation(row: Row) -> Question:
    """The same continuation after two contexts (Trinh and Le, arXiv 1806.02847)."""
    return Question(tuple(row["context_options"]), (row["continuation"],), row["gold"])


def letters(row: Row) -> Question:
    """MMLU: the context shows the choices with a letter each; the letter is the answer."""
    names = "ABCDEFGHIJ"[: len(row["choices"])]
    lines = "".join(
        f"{name}. {choice}\n" for name, choice in zip(names, row["choices"], strict=True)
    )
    return Question((f"{row['question'].strip()}\n{lines}Answer:",), tuple(names), row["gold"])


def cloze(row: Row) -> Question:
    """The choices are not shown; a choice's own words are the answer."""
    return multiple_choice("Question: {}\nAnswer:")({**row, "query": row["question"]})


def subject(kind: str) -> Callable[[Row], str]:
    """Makes MMLU's first line, which names the subject; `kind` is what the questions are."""
    start = f"The following are {kind} (with answers) about "
    return lambda row: start + row["subject"].replace("_", " ") + ".\n\n"


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
    """The name of a task; RegraftError naming near matches and all tasks for an unknown one.

    Args:
        name: the name to check.
        others: names that are allowed beside those of `TASKS`.
    """
    names = [*TASKS, *others]
    if name in names:
        return name
    hint = suggest(name, names, 2)
    raise RegraftError(f"unknown task '{name}': {hint}there are {', '.join(names)}")


def questions(
    name: str, folder: str | Path, limit: int | None = None, shots: int = 0
) -> list[Question]:
    """The questions of a task.

    Args:
        name: of the task.
        folder: has NAME.jsonl or NAME/NAME.jsonl, or what the task's `files` say.
        limit: how many questions, spread evenly over the file; None for all.
        shots: examples shown before each question.

    RegraftError for an unknown task, a missing or empty file, a line that does not fit, or too few
    examples.
    """
    task = TASKS[check_task_name(name)]
    rows = read_rows(find_file(name, task.files, Path(folder)), task.fields)
    if limit is not None and limit < 1:
        raise RegraftError(f"--limit {limit} leaves no question: ask for one at least")

    # MMLU shows examples of the question's own subject; tasks without subjects have the key None.
    examples: dict[str | None, list[Row]] = {}
    if shots:
        if task.shots is None:
            raise RegraftError(
                f"--shots {shots}: {name} has no file of examples; leave it out for this task"
            )
        for row in read_rows(find_file(name, (task.shots,), Path(folder)), task.fields):
            examples.setdefault(row.get("subject"), []).append(row)

    count = min(limit or len(rows), len(rows))
    chosen = [rows[number * len(rows) // count] for number in range(count)]
    return [add_examples(row, task, examples.get(row.get("subject"), []), shots) for row in chosen]


def add_examples(row: Row, task: Task, examples: Sequence[Row], shots: int) -> Question:
    """A line's question after the task's description and its first examples.

    Args:
        row: the line.
        task: its task.
        examples: lines to show, with their answers.
        shots: how many of them; RegraftError when there are fewer.
    """
    if len(examples) < shots:
        about = row.get("subject", "it")
        raise RegraftError(
            f"--shots {shots}: there are {len(examples)} examples for {about}; ask for no more"
        )
    question = task.ask(row)
    shown = [task.ask(example) for example in examples[:shots]]
    before = task.describe(row) + "".join(f"{q.contexts[0]} {q.choices[q.gold]}\n\n" for q in shown)
    contexts = tuple(before + context for context in question.contexts)
    return Question(contexts, question.choices, question.gold)


def find_file(name: str, files: Sequence[str], folder: Path) -> Path:
    """The first of a task's files that exists; RegraftError naming where it was looked for.

    Args:
        name: of the task.
        files: names of the file, `{}` standing for the task's name.
        folder: where they are, or a folder with the task's name in it.
    """
    names = [file.format(name) for file in files]
    places = [folder / part for file in names for part in dict.fromkeys((file, f"{name}/{file}"))]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(str(place) for place in places)
    raise RegraftError(
        f"no data for task {name}: looked for {looked}; give their folder as --task-data"
    )


def read_rows(file: Path, fields: Mapping[str, type]) -> list[Row]:
    """The lines of a .jsonl file, checked.

    Args:
        file: in UTF-8.
        fields: that every line must have, with their types.

    RegraftError for another encoding, a line that does not fit, or an empty file.
    """
    try:
        # not splitlines(): texts hold other line separators, such as U+2028
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RegraftError(
            f"'{file}' is not UTF-8 (byte {error.start}): get the file again"
        ) from error

    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_row(line, fields, f"'{file}' line {number}"))
    if not rows:
        raise RegraftError(f"'{file}' holds no question: get the file again")
    return rows


def parse_row(line: str, fields: Mapping[str, type], where: str) -> Row:
    """One line as a mapping.

    Args:
        line: JSON.
        fields: that it must have, with their types; a list has two strings or more.
        where: file and line, for errors.

    RegraftError when it is not JSON, a field is missing or of another type, or `gold` is the number
    of no choice.
    """
    row = parse_json(line.encode(), where, "is the file cut short? Get it again")
    for name, kind in fields.items():
        value: Any = row.get(name) if isinstance(row, dict) else None
        if not _fits(value, kind):
            raise RegraftError(
                f"{where} has no field '{name}' that is {KINDS[kind]} (it is {value!r})"
            )

    for name, kind in fields.items():
        if kind is list and not 0 <= row["gold"] < len(row[name]):
            raise RegraftError(
                f"{where}: gold is {row['gold']}, but there are {len(row[name])} choices, counted "
                "from 0"
            )
    return row


def _fits(value: Any, kind: type) -> bool:
    """Whether a value is of the type that a task's `fields` name."""
    if isinstance(value, bool):  # which Python takes for a whole number
        return False
    if kind is list:
        return (
            isinstance(value, list)
            and len(value) > 1
            and all(isinstance(item, str) and item for item in value)
        )
    return isinstance(value, kind)
