"""Which layers keep softmax attention, chosen by measurement: seconds a layer, no training.

Each rule gives every layer a score; the layers with the highest scores keep softmax attention.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..data.rows import Packed
from ..errors import RegraftError
from ..evaluation.baselines import TEACHER
from ..evaluation.chunked import log_likelihoods
from ..evaluation.perplexity import Candidate, Score, measure, window_logits
from ..mixers.remix import Remix
from ..mixers.remix_options import RULES
from ..modeling import flops
from ..train.calibrate import calibrate
from ..train.layer_subset import SkippedLayer, layer_stack
from ..train.layerwise.one_layer_model import replace_layer_input

EPSILON = 1e-6  # of HALO's score
Progress = Callable[[float], None]  # share done, 0 to 1


class LayerNumbers(TypedDict):
    """What a score was computed from: mean log-likelihoods or divergences per token, in nats."""

    nll: NotRequired[float]  # `bypass`: negative log-likelihood without the layer's attention
    kl: NotRequired[float]  # `restore`: KL(teacher || student) with this layer at softmax
    recall: NotRequired[float]  # `halo`, `recall`: log-likelihood of tokens that can be copied
    common: NotRequired[float]  # `halo`, `recall`: log-likelihood of all other tokens


class LayerRow(LayerNumbers):
    """A layer in the table of scores."""

    layer: int
    score: float


class SelectionScores(TypedDict):
    """How layers were chosen; kept as the `scores` of a Remix."""

    rule: str
    tokens: int  # of the windows that layers were measured on
    flops: int
    seconds: float
    layers: list[LayerRow]


@dataclass(frozen=True)
class LayerScore:
    """What a layer showed.

    Attributes:
        layer: its number.
        score: layers with the highest scores are kept.
        numbers: what the score was computed from.
    """

    layer: int
    score: float
    numbers: LayerNumbers

    def json(self) -> LayerRow:
        """One row of the table."""
        return {"layer": self.layer, "score": self.score, **self.numbers}


@dataclass(frozen=True)
class SelectionData:
    """What layers are measured on.

    Attributes:
        windows: rows of text.
        calibration: batches for the mixers' closed-form start: token ids, positions, and document
            numbers or None, (rows, length) each.
        progress: called with the share done.
    """

    windows: Packed
    calibration: Sequence[tuple[Tensor, Tensor, Tensor | None]] = ()
    progress: Progress = lambda share: None


def bypass(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """Log perplexity of the source when one layer's attention gives nothing.

    "AR" of Taylor-Calibrate (arXiv 2606.16429): what a layer's attention is worth, whatever
    replaces it.
    """
    model = modeling.load_stored(source)
    slots = modeling.slots(model, source)
    candidates = {
        i: Candidate(model, partial(zero_attention, slot)) for i, slot in enumerate(slots)
    }
    nlls = {i: one.nll / one.tokens for i, one in score_candidates(candidates, bench).items()}
    return [LayerScore(i, nll, {"nll": nll}) for i, nll in nlls.items()]


def restore(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """-KL(teacher || student) with this one layer back at softmax and all others converted.

    KL-guided selection (arXiv 2512.20569), here after the closed-form start instead of a training
    run per layer.
    """
    teacher, student = build_teacher_and_student(source, remix, bench)
    candidates = {
        i: Candidate(student, partial(softmax_in, student, source, teacher, [i]))
        for i in range(source.layers)
    }
    scores = score_candidates(candidates, bench, Candidate(teacher))
    kls = {i: (one.kl or 0.0) / one.tokens for i, one in scores.items()}
    return [LayerScore(i, -kl, {"kl": kl}) for i, kl in kls.items()]


def halo(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """HALO's score (arXiv 2601.22156): s_i = (max R - R_i) / (max C - C_i + 1e-6).

    R is recall and C commonsense of the source with layer i alone converted, both as
    `score_copying` measures them. A layer is kept when losing it costs recall and little else.
    """
    rows = score_copying(source, remix, bench)
    best_recall, best_common = (max(column) for column in zip(*rows, strict=True))
    scores = []
    for i, (found, common) in enumerate(rows):
        score = (best_recall - found) / (best_common - common + EPSILON)
        scores.append(LayerScore(i, score, {"recall": found, "common": common}))
    return scores


def recall(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[LayerScore]:
    """-R_i of `score_copying`: a layer is kept when losing it costs recall, whatever else it costs.

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
    """(R_i, C_i) with layer i alone converted, by layer: mean log-likelihoods on the windows.

    R is of tokens that can be copied from beyond the sliding window: their pair with the token
    before stood in the window of text before, further back than the mixer's window sees. C is of
    all other tokens. The mixers have their closed-form start.

    RegraftError when no token can be copied.
    """
    teacher, student = build_teacher_and_student(source, remix, bench)
    window = remix.window or 64
    rows = bench.windows.input_ids
    far = torch.stack([find_repeated_pairs(row, window) for row in rows])  # (windows, length - 1)
    if not bool(far.any()):
        raise RegraftError(
            f"no token of {len(far)} windows of {far.shape[1] + 1} can be copied from beyond "
            f"{window} tokens: give longer windows or another text"
        )

    layers, every_layer = layer_stack(student), range(source.layers)
    found: list[list[Tensor]] = [[] for _ in every_layer]  # of each layer, by window
    for done, row in enumerate(rows):
        # Below layer i all is as in the source. So the source's hidden states are recorded once,
        # and each pass begins at its layer: half the layers are computed on average.
        with (
            softmax_in(student, source, teacher, every_layer),
            record_hidden_states(layers) as inputs,
            torch.no_grad(),
        ):
            student.get_decoder()(input_ids=row[None], use_cache=False)
        for layer in every_layer:
            others = [other for other in every_layer if other != layer]
            with (
                softmax_in(student, source, teacher, others),
                start_at_layer(layers, layer, inputs[layer]),
            ):
                found[layer].append(token_log_likelihoods(student, row))
            bench.progress((done + (layer + 1) / source.layers) / len(far))

    stacked = [torch.stack(values) for values in found]  # (windows, length - 1) of each layer
    return [(float(values[far].mean()), float(values[~far].mean())) for values in stacked]


SELECTORS: dict[str, Callable[[Checkpoint, Remix, SelectionData], list[LayerScore]]] = dict(
    zip(RULES, (bypass, halo, recall, restore), strict=True)
)


def parse_keep(keep: str) -> tuple[str, str] | None:
    """(rule, how many layers) of "RULE:N" or "RULE:P%"; None for a `keep` that measures nothing.

    RegraftError for a rule without a number of layers.
    """
    word, _, number = keep.partition(":")
    if word not in RULES:
        return None
    if not re.fullmatch(r"[1-9]\d*%?", number):
        raise RegraftError(
            f"--keep '{keep}' does not say how many layers: give {word}:N or {word}:P%, such as "
            f"{word}:25%"
        )
    return word, number


def count_layers(number: str, layers: int) -> int:
    """How many of `layers` "8" or "25%" are; a share is rounded up, as `every:4` does it."""
    return -(-layers * int(number[:-1]) // 100) if number.endswith("%") else int(number)


def resolve_keep(source: Checkpoint, remix: Remix, bench: SelectionData) -> Remix:
    """A Remix with the layers that its rule chose, and how they were chosen as `scores`.

    Args:
        source: the model to linearize.
        remix: with a rule in `keep`; any other is returned as it is.
        bench: what layers are measured on.

    RegraftError when more layers are asked for than the model has.
    """
    parsed = parse_keep(remix.keep)
    if parsed is None:
        return remix
    rule, count = parsed[0], count_layers(parsed[1], source.layers)
    if count > source.layers:
        raise RegraftError(
            f"--keep '{remix.keep}' asks for more layers than the model's {source.layers}: ask for "
            "less"
        )

    begin = time.monotonic()
    with flops.build_flop_counter() as counter:
        scores = SELECTORS[rule](source, remix, bench)
    best = sorted(scores, key=lambda one: (-one.score, one.layer))[:count]  # ties: the lower layer
    keep = sorted(one.layer for one in best)

    table: SelectionScores = {
        "rule": rule,
        "tokens": bench.windows.input_ids.numel(),
        "flops": counter.get_total_flops(),
        "seconds": round(time.monotonic() - begin, 3),
        "layers": [one.json() for one in scores],
    }
    return dataclasses.replace(remix, keep=",".join(map(str, keep)), scores=dict(table))


def build_teacher_and_student(
    source: Checkpoint, remix: Remix, bench: SelectionData
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the source, the source with every layer converted and in its closed-form start)."""
    teacher = modeling.load_stored(source)
    student = modeling.materialize(dataclasses.replace(remix, keep="none", scores={})(source))
    if bench.calibration:
        slots = modeling.slots(teacher, source)
        for _ in calibrate(student.slots(), teacher, slots, list(bench.calibration)):
            pass  # it works layer by layer as it is iterated
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
    mixers, attentions = student.slots(), modeling.slots(teacher, source)
    name = student.config.slot  # path of the attention module, `{}` for the layer
    for layer in layers:
        student.set_submodule(name.format(layer), attentions[layer])
    try:
        yield
    finally:
        for layer in layers:
            student.set_submodule(name.format(layer), mixers[layer])


@contextmanager
def record_hidden_states(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Inside, a forward pass appends the hidden states that each decoder layer gets to the list.

    They are in the order of the layers, (rows, time, hidden) each.
    """
    states: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def start_at_layer(layers: nn.ModuleList, first: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward pass begins at a decoder layer; earlier layers cost nothing.

    Args:
        layers: the model's decoder layers.
        first: number of the layer.
        hidden: what it gets, (rows, time, hidden).
    """
    skipped = list(layers)[:first]
    with replace_layer_input(layers[first], hidden):
        try:
            for i in range(first):
                layers[i] = SkippedLayer()
            yield
        finally:
            for i, layer in enumerate(skipped):
                layers[i] = layer


def score_candidates(
    layers: Mapping[int, Candidate], bench: SelectionData, teacher: Candidate | None = None
) -> dict[int, Score]:
    """The windows' likelihood, and KL to a teacher, with each layer changed in turn.

    Args:
        layers: the model as it is measured for each layer.
        bench: the windows.
        teacher: what KL is measured to; None leaves it out.
    """
    candidates = {str(layer): candidate for layer, candidate in layers.items()}
    if teacher:
        candidates[TEACHER] = teacher
    scores = measure(
        candidates,
        bench.windows.input_ids,
        bench.windows.bytes,
        TEACHER if teacher else None,
        lambda done, total: bench.progress(done / total),
    )
    return {layer: scores[str(layer)] for layer in layers}


def token_log_likelihoods(model: PreTrainedModel, row: Tensor) -> Tensor:
    """row: (length,) -> log-likelihoods of every token but the first, (length - 1,)."""
    return log_likelihoods(window_logits(Candidate(model), row), row[1:])


def find_repeated_pairs(row: Tensor, window: int) -> Tensor:
    """Which tokens can be copied, but only from beyond a sliding window.

    Args:
        row: token ids, (length,).
        window: tokens that the sliding window sees.

    Returns (length - 1,), true where row[i + 1] completes a pair of tokens that stood together
    before, last more than `window` tokens ago.
    """
    pairs = torch.stack((row[:-1], row[1:]), 1)  # (length - 1, 2)
    same = (pairs.unsqueeze(0) == pairs.unsqueeze(1)).all(-1)  # (length - 1, length - 1)
    index = torch.arange(len(pairs))
    back = index.unsqueeze(1) - index.unsqueeze(0)  # how far back; negative: ahead

    seen_far = (same & (back > window)).any(1)
    seen_near = (same & (back > 0) & (back <= window)).any(1)
    return seen_far & ~seen_near
