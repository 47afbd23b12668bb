"""Which layers keep softmax attention, chosen by measurement: seconds a layer, no training."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..data.packing import Packed
from ..errors import RegraftError
from ..evaluation.baselines import TEACHER
from ..evaluation.chunked import log_likelihoods
from ..evaluation.perplexity import Candidate, Score, measure, window_logits
from ..mixers.remix import RULES, Remix
from ..modeling import flops
from ..train.calibrate import calibrate
from ..train.layer_subset import SkippedLayer, layer_stack
from ..train.layerwise.one_layer_model import replace_layer_input

EPSILON = 1e-6
Progress = Callable[[float], None]


@dataclass(frozen=True)
class LayerScore:
    """What a layer showed: its score (the highest are kept) and the numbers that it comes from."""

    layer: int
    score: float
    numbers: dict[str, float]

    def json(self) -> dict[str, float]:
        """One row of the table."""
        return {"layer": self.layer, "score": self.score, **self.numbers}


@dataclass(frozen=True)
class SelectionData:
    """What layers are measured on: `windows` of text; `calibration` batches for the mixers' closed-form start."""

    windows: Packed
    calibration: Sequence[tuple[Tensor, Tensor, Tensor | None]] = ()
    progress: Progress = lambda share: None


def bypass(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """log perplexity of the source when one layer's attention gives nothing ("AR" of Taylor-Calibrate, arXiv
    2606.16429): what a layer's attention is worth, whatever replaces it."""
    model = modeling.materialize(source)
    slots = modeling.slots(model, source)
    scores = score_candidates(
        {i: Candidate(model, partial(zero_attention, slot)) for i, slot in enumerate(slots)}, bench
    )
    return [
        LayerScore(i, one.nll / one.tokens, {"nll": one.nll / one.tokens})
        for i, one in scores.items()
    ]


def restore(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """-KL(teacher || student with this one layer back at softmax), all others converted (KL-guided selection, arXiv
    2512.20569, here after the closed-form start instead of a training run per layer)."""
    teacher, student = build_teacher_and_student(source, remix, bench)
    swapped = {i: partial(softmax_in, student, source, teacher, [i]) for i in range(source.layers)}
    scores = score_candidates(
        {i: Candidate(student, swap) for i, swap in swapped.items()}, bench, Candidate(teacher)
    )
    kls = {i: (one.kl or 0.0) / one.tokens for i, one in scores.items()}
    return [LayerScore(i, -kl, {"kl": kl}) for i, kl in kls.items()]


def halo(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """HALO's score (arXiv 2601.22156): s_i = (max R - R_i) / (max C - C_i + 1e-6), R recall and C commonsense of the
    source with layer i alone converted. A layer is kept when losing it costs recall and little else.

    R and C as `copying` measures them.
    """
    rows = score_copying(source, remix, bench)
    top = [max(column) for column in zip(*rows, strict=True)]
    return [
        LayerScore(
            i, (top[0] - recall) / (top[1] - common + EPSILON), {"recall": recall, "common": common}
        )
        for i, (recall, common) in enumerate(rows)
    ]


def recall(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """-R_i of `copying`: a layer is kept when losing it costs recall, whatever else it costs.

    HALO's ratio favours layers that cost nothing at all, where it divides by almost zero.
    """
    rows = score_copying(source, remix, bench)
    return [
        LayerScore(i, -found, {"recall": found, "common": common})
        for i, (found, common) in enumerate(rows)
    ]


def score_copying(
    source: Checkpoint, remix: Remix, bench: SelectionData
) -> list[tuple[float, float]]:
    """(R_i, C_i) with layer i alone converted, by layer: mean log likelihoods on the windows.

    R is of tokens whose last two tokens stood together before in the window, further back than the sliding window sees
    (they can be copied), C of all other tokens. The mixers have their closed-form start.
    """
    teacher, student = build_teacher_and_student(source, remix, bench)
    far = torch.stack(
        [find_repeated_pairs(row, remix.window or 64) for row in bench.windows.input_ids]
    )
    if not bool(far.any()):
        raise RegraftError(
            f"no token of {len(far)} windows of {far.shape[1] + 1} can be copied from beyond {remix.window or 64} "
            "tokens: give longer windows or another text"
        )
    layers, everyone = layer_stack(student), range(source.layers)
    found: list[list[Tensor]] = [[] for _ in everyone]
    for done, row in enumerate(bench.windows.input_ids):
        with (
            softmax_in(student, source, teacher, everyone),
            record_hidden_states(layers) as inputs,
            torch.no_grad(),
        ):
            student.forward_decoder(row[None])
        for layer in everyone:
            others = [other for other in everyone if other != layer]
            with (
                softmax_in(student, source, teacher, others),
                start_at_layer(layers, layer, inputs[layer]),
            ):
                found[layer].append(token_log_likelihoods(student, row))
            bench.progress((done + (layer + 1) / source.layers) / len(far))
    stacked = [torch.stack(rows) for rows in found]
    return [(float(rows[far].mean()), float(rows[~far].mean())) for rows in stacked]


SELECTORS: dict[str, Callable[[Checkpoint, Remix, SelectionData], list[LayerScore]]] = dict(
    zip(RULES, (bypass, halo, recall, restore), strict=True)
)


def parse_keep(keep: str) -> tuple[str, str] | None:
    """(rule, how many layers) of "RULE:N" or "RULE:P%"; None for a `keep` that needs no measurement."""
    word, _, number = keep.partition(":")
    if word not in RULES:
        return None
    if not re.fullmatch(r"[1-9]\d*%?", number):
        raise RegraftError(
            f"--keep '{keep}' does not say how many layers: give {word}:N or {word}:P%, such as {word}:25%"
        )
    return word, number


def count_layers(number: str, layers: int) -> int:
    """How many of `layers` "8" or "25%" are, a share rounded up: 25% keeps as many as every:4."""
    return -(-layers * int(number[:-1]) // 100) if number.endswith("%") else int(number)


def resolve_keep(source: Checkpoint, remix: Remix, bench: SelectionData) -> Remix:
    """`remix` with the layers that its rule chose, the table of scores and what it cost to make; unchanged when it
    names no rule."""
    wanted = parse_keep(remix.keep)
    if wanted is None:
        return remix
    rule, count = wanted[0], count_layers(wanted[1], source.layers)
    if count > source.layers:
        raise RegraftError(
            f"--keep '{remix.keep}' asks for more layers than the model's {source.layers}: ask for less"
        )
    begin = time.monotonic()
    with flops.build_flop_counter() as counter:
        found = SELECTORS[rule](source, remix, bench)
    kept = sorted(
        sorted(found, key=lambda one: (-one.score, one.layer))[:count], key=lambda one: one.layer
    )
    table = {
        "rule": rule,
        "tokens": bench.windows.input_ids.numel(),
        "flops": counter.get_total_flops(),
        "seconds": round(time.monotonic() - begin, 3),
        "layers": [one.json() for one in found],
    }
    return dataclasses.replace(remix, keep=",".join(str(one.layer) for one in kept), scores=table)


def build_teacher_and_student(
    source: Checkpoint, remix: Remix, bench: SelectionData
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the source, the source with every layer converted and in its closed-form start)."""
    teacher = modeling.materialize(source)
    student = modeling.materialize(dataclasses.replace(remix, keep="none", scores={})(source))
    if bench.calibration:
        for _ in calibrate(
            student.slots(), teacher, modeling.slots(teacher, source), list(bench.calibration)
        ):
            pass
    return teacher, student


@contextmanager
def zero_attention(slot: nn.Module) -> Iterator[None]:
    """Inside, an attention module gives zeros."""
    handle = slot.register_forward_hook(
        lambda module, given, out: (torch.zeros_like(out[0]), *out[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def softmax_in(
    student: PreTrainedModel, source: Checkpoint, teacher: PreTrainedModel, layers: Sequence[int]
) -> Iterator[None]:
    """Inside, these layers of a wholly converted student have the teacher's attention."""
    mine, theirs = student.slots(), modeling.slots(teacher, source)
    name = student.config.slot
    for layer in layers:
        student.host.set_submodule(name.format(layer), theirs[layer])
    try:
        yield
    finally:
        for layer in layers:
            student.host.set_submodule(name.format(layer), mine[layer])


@contextmanager
def record_hidden_states(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Inside, the hidden states that come to each decoder layer, in order, as one forward pass adds them."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def start_at_layer(layers: nn.ModuleList, first: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a pass begins at decoder layer `first`, with what came to it before; earlier ones cost nothing."""
    away = list(layers)[:first]
    with replace_layer_input(layers[first], hidden):
        try:
            for i in range(first):
                layers[i] = SkippedLayer()
            yield
        finally:
            for i, layer in enumerate(away):
                layers[i] = layer


def score_candidates(
    layers: Mapping[int, Candidate], bench: SelectionData, teacher: Candidate | None = None
) -> dict[int, Score]:
    """The windows' likelihood, and KL to a teacher, with each layer changed in turn."""
    everyone = {str(layer): candidate for layer, candidate in layers.items()}
    everyone |= {TEACHER: teacher} if teacher else {}
    ids, sizes = bench.windows.input_ids, bench.windows.bytes
    scores = measure(
        everyone, ids, sizes, TEACHER if teacher else None, lambda done, n: bench.progress(done / n)
    )
    return {layer: scores[str(layer)] for layer in layers}


def token_log_likelihoods(model: PreTrainedModel, row: Tensor) -> Tensor:
    """Log likelihood of every token but the first, (length - 1,)."""
    return log_likelihoods(window_logits(Candidate(model), row), row[1:])


def find_repeated_pairs(row: Tensor, window: int) -> Tensor:
    """Which of row[1:] complete a pair of tokens that stood together last more than `window` tokens before."""
    pairs = torch.stack((row[:-1], row[1:]), 1)
    same = (pairs.unsqueeze(0) == pairs.unsqueeze(1)).all(-1)
    index = torch.arange(len(pairs))
    back = index.unsqueeze(1) - index.unsqueeze(0)
    return (same & (back > window)).any(1) & ~(same & (back > 0) & (back <= window)).any(1)
