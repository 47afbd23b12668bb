"""Tables of quality and speed: a model beside its baselines, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..data.default_text import heldout_topics
from ..data.packing import Packed, long_windows, read_documents
from ..errors import RegraftError
from . import baselines
from .perplexity import Candidate, measure
from .recall import KINDS
from .suite import LENGTHS, Suite, Tell, add_differences, add_share_of_teacher

Progress = Callable[[int, int], None]


def evaluation_windows(data: str | None, tokenizer: Any, count: int, length: int) -> Packed:
    """`count` windows of `length` tokens, each inside one document, spread evenly over the text.

    Without `data`, the held-out topics of Python's documentation. RegraftError when no document is that long.
    """
    if count < 1 or length < 2:
        raise RegraftError(
            f"cannot measure {count} windows of {length} tokens: ask for >= 1 window of >= 2 tokens"
        )
    rows = long_windows(load_documents(data), tokenizer, length)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def load_documents(data: str | None) -> list[str]:
    """Texts to measure on: those of a file or folder, or the held-out topics of Python's documentation."""
    return read_documents(data) if data else heldout_topics()


def evaluate(
    model: str,
    baseline: str | None,
    data: str | None,
    count: int,
    length: int,
    progress: Progress | None = None,
    scratch: str | None = None,
) -> dict[str, Any]:
    """The table of one model: its own fields and `baselines` by name.

    With `baseline`, a source: the teacher, the zero-token windows and, when the model's lineage tells how it was
    linearized, the conversion before training; every row's KL is to that teacher. With `scratch`, that model's row. A
    gated model also has a row with its linear branch switched off.
    """
    checkpoint = Checkpoint.open(model)
    rows = evaluation_windows(data, modeling.load_tokenizer(model), count, length)
    candidates: dict[str, Candidate] = {}
    if baseline:
        remix = baselines.remix_of(checkpoint)
        makers = baselines.zero_token(Checkpoint.open(baseline), remix) if remix else {}
        teacher = {baselines.TEACHER: lambda: Candidate(modeling.load(baseline))}
        candidates |= {name: make() for name, make in (teacher | makers).items()}
    if scratch:
        candidates[baselines.SCRATCH] = Candidate(
            modeling.load(check_same_vocabulary(scratch, checkpoint))
        )
    candidates |= baselines.model_candidates(modeling.materialize(checkpoint))
    scores = measure(
        candidates, rows.input_ids, rows.bytes, baselines.TEACHER if baseline else None, progress
    )
    return assemble_rows({name: score.json() for name, score in scores.items()}, model)


def build_suite(
    model: str,
    names: Sequence[str] = (),
    data: str | None = None,
    windows: tuple[int, int] | None = None,
    lengths: Sequence[int] = LENGTHS,
    **options: Any,
) -> Suite:
    """What to measure of `model`, with its tokenizer: benchmarks and recall by name, recall's contexts filled with
    `data`'s text; with `windows` (count, length), perplexity by position in `data`. `options`: Suite's others."""
    checkpoint, tokenizer = Checkpoint.open(model), modeling.load_tokenizer(model)
    recalls = [*lengths] if set(names) & set(KINDS) else []
    check_context_lengths(checkpoint, recalls + ([windows[1]] if windows else []))
    rows = evaluation_windows(data, tokenizer, *windows).input_ids if windows else None
    return Suite(
        tokenizer,
        names,
        lengths=lengths,
        filler=load_documents(data) if recalls else (),
        documents=rows,
        **options,
    )


def benchmark(
    model: str,
    suite: Suite,
    baseline: str | None = None,
    scratch: str | None = None,
    tell: Tell = lambda s, w: None,
) -> dict[str, Any]:
    """What `suite` measures, for the model and the same baselines as in `evaluate`, one model in memory at a time.

    Baselines that are the same model (a window conversion and its own baseline) are measured once. With `baseline`,
    tasks also have `of_teacher`.
    """
    checkpoint = Checkpoint.open(model)
    remix = baselines.remix_of(checkpoint)
    variants = (
        (baselines.variants(remix) if remix else {baselines.TEACHER: None}) if baseline else {}
    )
    if scratch:
        check_same_vocabulary(scratch, checkpoint)
    rows: dict[str, dict[str, Any]] = {}
    total = len(variants) + bool(scratch) + 1 + baselines.has_gate(checkpoint.config.get("mixers"))

    def measure_row(name: str, candidate: Candidate) -> dict[str, Any]:
        done = len(rows) / total
        return suite(
            candidate, lambda share, words: tell(min(done + share / total, 1.0), f"{name}: {words}")
        )

    for name, variant in variants.items():
        twin = next((other for other in rows if variants[other] == variant), None)
        rows[name] = (
            rows[twin]
            if twin
            else measure_row(
                name, baselines.build_candidate(Checkpoint.open(baseline or ""), variant)
            )
        )
    if scratch:
        rows[baselines.SCRATCH] = measure_row(baselines.SCRATCH, Candidate(modeling.load(scratch)))
    for name, candidate in baselines.model_candidates(modeling.materialize(checkpoint)).items():
        rows[name] = measure_row(name, candidate)
    if baseline:
        rows = {
            name: add_share_of_teacher(found, rows[baselines.TEACHER])
            for name, found in rows.items()
        }
    return assemble_rows(rows, model)


def check_same_vocabulary(scratch: str, checkpoint: Checkpoint) -> str:
    """The path of a model trained from scratch; RegraftError when it does not read the same tokens."""
    theirs, ours = (opened.sizes["vocab"] for opened in (Checkpoint.open(scratch), checkpoint))
    if theirs != ours:
        raise RegraftError(
            f"--scratch {scratch} has {theirs} tokens where the model has {ours}: give one with its tokenizer"
        )
    return scratch


def check_context_lengths(checkpoint: Checkpoint, lengths: Sequence[int]) -> None:
    """RegraftError when a model counts its positions and cannot count that far."""
    most = checkpoint.sizes.get("pos")
    if most is not None and (far := [length for length in lengths if length > most]):
        raise RegraftError(
            f"'{checkpoint.origin}' has {most} positions: {far[0]} tokens are too many for it"
        )


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    folder: str,
    limit: int | None = None,
    shots: int = 0,
    batch: int = 8,
) -> dict[str, Any]:
    """Benchmark scores of a model in memory: `tasks` by name, `average`, `average_above_chance` (see evals.harness)."""
    return Suite(tokenizer, names, folder, limit, shots, batch=batch)(Candidate(model))


def evaluate_recall(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str] = ("passkey", "needle", "mqar"),
    lengths: Sequence[int] = LENGTHS,
    limit: int | None = None,
    data: str | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Recall of a model in memory by kind and length (see evals.recall); `data`: filler text."""
    suite = Suite(
        tokenizer, names, limit=limit, lengths=lengths, filler=load_documents(data), batch=batch
    )
    return suite(Candidate(model))["recall"]


def assemble_rows(rows: Mapping[str, dict[str, Any]], model: str) -> dict[str, Any]:
    """The contract's JSON: the model's fields on top, every other row under `baselines`, with the model's lead."""
    own, order = rows[baselines.MODEL], dict.fromkeys((*baselines.ROWS, *rows))
    others = {
        name: add_differences(rows[name], own)
        for name in order
        if name in rows and name != baselines.MODEL
    }
    return {"model": model, **own, "baselines": others}
