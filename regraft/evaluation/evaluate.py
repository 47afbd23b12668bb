"""Tables of quality: a model with its baselines, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..data.default_text import heldout_topics
from ..data.packing import long_windows, read_documents
from ..data.rows import Packed
from ..errors import RegraftError
from ..mixers.remix import Remix, needs_bos
from ..modeling.loading import bos_token_id
from . import baselines
from .perplexity import Candidate, Progress, measure
from .recall import KINDS
from .rows import Evaluation, QualityRow, RecallScore, SuiteRow
from .suite import LENGTHS, Report, Suite, add_differences, add_share_of_teacher


def evaluation_windows(
    data: str | None, tokenizer: Any, count: int, length: int, bos: bool = False
) -> Packed:
    """Windows of text to measure perplexity on, spread evenly over it.

    Args:
        data: file or folder. None: the held-out topics of Python's documentation.
        tokenizer: of the model.
        count: windows, at most as many as the text has.
        length: tokens of a window, all inside one document.
        bos: whether the tokenizer's BOS token takes the place of each window's first token, which
            is never predicted.

    RegraftError when no document is that long.
    """
    if count < 1 or length < 2:
        raise RegraftError(
            f"cannot measure {count} windows of {length} tokens: ask for >= 1 window of >= 2 tokens"
        )
    rows = long_windows(load_documents(data), tokenizer, length)
    chosen = rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]
    if not bos:
        return chosen
    first = torch.full_like(chosen.input_ids[:, :1], bos_token_id(tokenizer))
    return replace(chosen, input_ids=torch.cat((first, chosen.input_ids[:, 1:]), 1))


def load_documents(data: str | None) -> list[str]:
    """Texts of a file or folder; for None the held-out topics of Python's documentation."""
    return read_documents(data) if data else heldout_topics()


def evaluate(
    model: str,
    baseline: str | None,
    data: str | None,
    count: int,
    length: int,
    progress: Progress | None = None,
    scratch: str | None = None,
    trust_remote_code: bool = False,
    bos: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Perplexity of a model and its baselines on the same windows of text.

    A model with gated layers also has a row with their linear branch switched off.

    Args:
        model: path of the model.
        baseline: path of its source. Adds the teacher and, when the model's lineage tells how it
            was linearized, the rows that need no training; every row then has its KL to the
            teacher.
        data: text to measure on. None: the held-out topics of Python's documentation.
        count: windows of text.
        length: tokens of a window.
        progress: called with the forward passes done and their total.
        scratch: path of a model of the same architecture that was trained from scratch.
        trust_remote_code: whether code of the tokenizer may be run.
        bos: whether windows begin with the tokenizer's BOS token; they do for models whose mixers
            are made for that.
        dtype: of the model's weights, not of the others'.
    """
    checkpoint = Checkpoint.open(model)
    tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    bos = bos or needs_bos(checkpoint)
    rows = evaluation_windows(data, tokenizer, count, length, bos)

    candidates: dict[str, Candidate] = {}
    if baseline:
        if remix := baselines.remix_of(checkpoint):  # the teacher is one of these
            makers = baselines.zero_token(Checkpoint.open(baseline), remix)
            candidates |= {name: make() for name, make in makers.items()}
        else:
            candidates[baselines.TEACHER] = Candidate(modeling.load(baseline))
    if scratch:
        check_same_vocabulary(scratch, checkpoint)
        candidates[baselines.SCRATCH] = Candidate(modeling.load(scratch))
    candidates |= baselines.model_candidates(modeling.load_stored(checkpoint, dtype))

    teacher = baselines.TEACHER if baseline else None
    scores = measure(candidates, rows.input_ids, rows.bytes, teacher, progress)
    table: dict[str, QualityRow] = {name: {**score.json()} for name, score in scores.items()}
    return assemble_rows(table, model)


def build_suite(
    model: str,
    names: Sequence[str] = (),
    data: str | None = None,
    windows: tuple[int, int] | None = None,
    lengths: Sequence[int] = LENGTHS,
    trust_remote_code: bool = False,
    bos: bool = False,
    **options: Any,
) -> Suite:
    """What to measure of a model, in its tokens.

    Args:
        model: path of the model; one with the same tokenizer may be measured instead.
        names: benchmark tasks and kinds of recall.
        data: text that fills recall's contexts, and whose perplexity by position is measured.
            None: the held-out topics of Python's documentation.
        windows: (how many, tokens of each) for perplexity by position; None leaves it out.
        lengths: context lengths of recall, in tokens.
        trust_remote_code: whether code of the tokenizer may be run.
        bos: whether the documents of perplexity by position begin with the BOS token; see
            `evaluate`.
        options: the other arguments of a `Suite`.

    RegraftError when the model has too few positions for a length, and from `Suite`.
    """
    checkpoint = Checkpoint.open(model)
    tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    bos = bos or needs_bos(checkpoint)
    recall_lengths = [*lengths] if set(names) & set(KINDS) else []
    check_context_lengths(checkpoint, recall_lengths + ([windows[1]] if windows else []))

    return Suite(
        tokenizer,
        names,
        lengths=lengths,
        filler=load_documents(data) if recall_lengths else (),
        documents=(
            evaluation_windows(data, tokenizer, *windows, bos).input_ids if windows else None
        ),
        **options,
    )


def benchmark(
    model: str,
    suite: Suite,
    baseline: str | None = None,
    scratch: str | None = None,
    report_progress: Report = lambda share, words: None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """What a suite measures, of a model and the same baselines as in `evaluate`.

    One model is in memory at a time.

    Args:
        model: path of the model.
        suite: what to measure.
        baseline: path of its source. Tasks then also have `of_teacher`.
        scratch: path of a model of the same architecture that was trained from scratch.
        report_progress: called with the share done, 0 to 1, and a few words.
        dtype: of the model's weights, not of the others'.
    """
    checkpoint = Checkpoint.open(model)
    remix = baselines.remix_of(checkpoint)
    variants: dict[str, Remix | None] = {}
    if baseline:
        variants = (
            baselines.variants(Checkpoint.open(baseline), remix)
            if remix
            else {baselines.TEACHER: None}
        )
    if scratch:
        check_same_vocabulary(scratch, checkpoint)

    rows: dict[str, SuiteRow] = {}
    has_gate = baselines.has_gate(checkpoint.config.get("mixers"))
    total = len(variants) + bool(scratch) + 1 + has_gate

    def measure_row(name: str, candidate: Candidate) -> SuiteRow:
        done = len(rows) / total

        def report(share: float, words: str) -> None:
            report_progress(min(done + share / total, 1.0), f"{name}: {words}")

        return suite(candidate, report)

    for name, variant in variants.items():
        # Variants may be equal: of a model that was linearized to windows, the window in every
        # layer is also the conversion before training.
        twin = next((other for other in rows if variants[other] == variant), None)
        if twin:
            rows[name] = rows[twin]
        else:
            candidate = baselines.build_candidate(Checkpoint.open(baseline or ""), variant)
            rows[name] = measure_row(name, candidate)
    if scratch:
        rows[baselines.SCRATCH] = measure_row(baselines.SCRATCH, Candidate(modeling.load(scratch)))
    own = modeling.load_stored(checkpoint, dtype)
    for name, candidate in baselines.model_candidates(own).items():
        rows[name] = measure_row(name, candidate)

    if baseline:
        teacher = rows[baselines.TEACHER]
        rows = {name: add_share_of_teacher(row, teacher) for name, row in rows.items()}
    return assemble_rows(rows, model)


def check_same_vocabulary(scratch: str, checkpoint: Checkpoint) -> None:
    """RegraftError when a model trained from scratch does not have as many tokens as the model."""
    other, own = (opened.sizes["vocab"] for opened in (Checkpoint.open(scratch), checkpoint))
    if other != own:
        raise RegraftError(
            f"--scratch {scratch} has {other} tokens where the model has {own}: give one with its "
            "tokenizer"
        )


def check_context_lengths(checkpoint: Checkpoint, lengths: Sequence[int]) -> None:
    """RegraftError when a model has fewer positions than one of the lengths."""
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
) -> SuiteRow:
    """Benchmark scores of a model in memory; the arguments are those of `Suite`."""
    return Suite(tokenizer, names, folder, limit, shots, batch=batch)(Candidate(model))


def evaluate_recall(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str] = ("passkey", "needle", "mqar"),
    lengths: Sequence[int] = LENGTHS,
    limit: int | None = None,
    data: str | None = None,
    batch: int = 8,
) -> dict[str, dict[str, RecallScore]]:
    """Recall of a model in memory, by kind and length.

    Args:
        model: a causal language model with a cache.
        tokenizer: of the model.
        names: kinds of recall, see `recall.KINDS`.
        lengths: context lengths in tokens.
        limit: contexts of each cell; None: `suite.ITEMS`.
        data: text that fills the contexts. None: the held-out topics of Python's documentation.
        batch: contexts read at a time.
    """
    suite = Suite(
        tokenizer, names, limit=limit, lengths=lengths, filler=load_documents(data), batch=batch
    )
    return suite(Candidate(model))["recall"]


def assemble_rows(rows: Mapping[str, SuiteRow], model: str) -> Evaluation:
    """The JSON of an evaluation: the model's row, and the others with their difference from it.

    Args:
        rows: by name; `baselines.MODEL` is the model's own.
        model: its path.
    """
    own = rows[baselines.MODEL]
    order = dict.fromkeys((*baselines.ROWS, *rows))  # known baselines first, in their order
    others = {
        name: add_differences(rows[name], own)
        for name in order
        if name in rows and name != baselines.MODEL
    }
    return {"model": model, **own, "baselines": others}
