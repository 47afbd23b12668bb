"""Calibration: a closed-form start of a new mixer from its teacher's attention, no gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RegraftError
from ..mixers.base import Mixer, MixerContext
from ..mixers.gated import GatedMixer
from ..mixers.inherit import parse_inherit
from ..mixers.linear import LinearAttention
from ..mixers.sink_window import SinkWindow
from ..mixers.source_windows import source_windows
from ..progress import ProgressCallback
from .hooks import LayerRecord, record_layers, run_decoder
from .sinks import Batch, SinkFit, begin_rows, find_starts, fit_sinks

RIDGE = 1e-3
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # gate candidates: these shares of the far attention mass
GATE_RANGE = (0.01, 0.9)  # targets of the gate, so that its logit stays finite
SIZE_RANGE = (0.02, 4.0)  # of a head's output, as a share of its mean
NEWTON = 20  # steps
CALIBRATED_TOGETHER = 1024  # tokens of a batch, where rows are not longer


class MixerCalibration(TypedDict):
    """What calibration found for one mixer; only `heads_folded` for one with nothing to set."""

    outside_window: NotRequired[float]  # attention mass beyond the window and the sinks
    mean_distance: NotRequired[float]  # tokens that this mass looks back
    entropy: NotRequired[float]  # of the attention, as a share of the largest possible
    half_life: NotRequired[float]  # tokens, of a decay that loses half in `mean_distance`
    gate_share: NotRequired[float]  # mean of the chosen SHARES; 1 without a gate
    sink_share: NotRequired[float]  # of the first token beside a window with a learned sink
    sink_error: NotRequired[float]  # root mean square, of the shares that the sinks give
    heads_folded: float  # 1 when the value maps are in the weights, else 0


class CalibrationRow(MixerCalibration):
    """The same with the layer's number."""

    layer: int


@dataclass
class AttentionStatistics:
    """One teacher layer on one batch: what each head attends to and what it reads; float32."""

    heads: Tensor  # (batch, heads, time, dim): the teacher's per-head outputs
    outside: Tensor  # (batch, heads, time): attention mass beyond the window and sinks
    distance: Tensor  # (batch, heads, time): distance summed over that mass
    entropy: Tensor  # (batch, heads, time): attention entropy over log(tokens seen)


Records = Sequence[tuple[LayerRecord, AttentionStatistics]]


def compute_attention_statistics(
    mixer: Mixer, record: LayerRecord, segments: Tensor | None, window: int, sinks: int
) -> AttentionStatistics:
    """Softmax attention from the mixer's inherited projections.

    The projections must still be the teacher's: nothing folded or trained.

    Args:
        mixer: a mixer with the teacher's q, k and v.
        record: what the teacher's attention got.
        segments: (batch, time) number of the document of each token; None: one document a row.
        window: tokens that the mixer's window sees, 0 for none.
        sinks: first tokens of each document that it always sees.
    """
    q, k, v = mixer.qkv(record.inputs)  # (batch, heads or kv heads, time, dim)
    q, k = mixer.rotate(q, k, record.rotary)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))

    time = q.shape[2]
    index = torch.arange(time, device=q.device)
    distance = index.unsqueeze(-1) - index  # (query, key)
    seen = (distance >= 0).unsqueeze(0)
    start = torch.zeros(q.shape[0], time, dtype=torch.long, device=q.device)
    if segments is not None:
        seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
        start = seen.long().argmax(-1)  # the first key seen: where the query's document begins

    scores = mixer.attention.scale_scores(q @ k.transpose(-1, -2))
    weight = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    is_far = (distance >= window) & ((index - start.unsqueeze(-1)) >= sinks)
    far = is_far.unsqueeze(1) * weight

    # A token that sees only itself has entropy 0: log 2 instead of log 1 avoids dividing by 0.
    count = (index - start + 1).clamp(min=2).unsqueeze(1)
    entropy = -torch.special.xlogy(weight, weight).sum(-1) / count.log()
    return AttentionStatistics(weight @ v, far.sum(-1), (far * distance).sum(-1), entropy)


class RidgeRegression:
    """Ridge regressions side by side: features (..., n, f) -> targets (..., n, t).

    Only the normal equations are kept, so that rows can come batch by batch.
    """

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0  # X^T X: (..., f, f)
        self.cross: Tensor | float = 0.0  # X^T Y: (..., f, t)
        self.energy: Tensor | float = 0.0  # ||Y||^2: (...)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in more rows."""
        self.gram = self.gram + features.mT @ features
        self.cross = self.cross + features.mT @ targets
        self.energy = self.energy + targets.square().sum((-2, -1))

    def solve(self, ridge: float = RIDGE, prior: float = 0.0) -> Tensor:
        """Coefficients W (..., f, t) of min ||X W - Y||^2 + penalty ||W - prior I||^2.

        Args:
            ridge: the penalty as a share of the features' mean square.
            prior: what multiple of the identity W is drawn to.
        """
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        # The small constant keeps features that are all zero solvable.
        penalty = (ridge * scale + 1e-12) * torch.eye(gram.shape[-1], device=gram.device)
        return torch.linalg.solve(gram + penalty, cross + prior * penalty if prior else cross)

    def residual_error(self, coefficients: Tensor) -> Tensor:
        """||X W - Y||^2 for coefficients W (..., f, t): (...)."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        # ||X W - Y||^2 = ||Y||^2 - (2 <W, X^T Y> - <W, X^T X W>)
        linear = 2 * (coefficients * cross).sum((-2, -1))
        quadratic = (coefficients * (gram @ coefficients)).sum((-2, -1))
        return torch.as_tensor(self.energy) - (linear - quadratic)


def gate_candidates(records: Records) -> Tensor:
    """Gate weights and bias for g = share x attention mass m outside the window.

    Softmax attention is exactly (1 - m) window + m rest, so m is the right gate for a linear
    branch that gives the rest; smaller shares suit one that does not. The candidates are ridge
    regressions of logit(share x m) on the layer's input.

    Returns:
        (candidates, hidden + 1, heads), the bias last.
    """
    fits = []
    for share in SHARES:
        problem = RidgeRegression()
        for record, seen in records:
            target = (share * seen.outside).clamp(*GATE_RANGE).logit()  # (batch, heads, time)
            features = _append_ones(record.inputs).flatten(0, 1)  # (batch * time, hidden + 1)
            problem.add(features, target.transpose(1, 2).flatten(0, 1))
        fits.append(problem.solve())
    return torch.stack(fits)


def _append_ones(x: Tensor) -> Tensor:
    """A column of ones for the bias."""
    return torch.cat((x.float(), torch.ones_like(x[..., :1])), dim=-1)


def fit_output_gate(mixer: LinearAttention, records: Records) -> None:
    """Set a SiLU gate so that a normed head is about as large as the teacher's.

    A norm takes from a head's outputs how large they are, for example how little a head gives that
    looks at a text's first token. The gate of all of a head's coordinates is the ridge regression,
    without a bias, of the number whose SiLU is the root mean square of the teacher's head, as a
    share of its mean.

    Args:
        mixer: with a gate of SiLU behind a norm per head.
        records: by batch, what the layer got and what its attention was.
    """
    size = torch.cat([seen.heads.square().mean(-1).sqrt() for _, seen in records])
    share = size / size.mean((0, 2), keepdim=True).clamp(min=1e-12)
    targets = invert_silu(share.clamp(*SIZE_RANGE)).transpose(1, 2)  # (rows, time, heads)
    problem = RidgeRegression()
    features = torch.cat([record.inputs.float() for record, _ in records])
    problem.add(features.flatten(0, 1), targets.flatten(0, 1))
    by_head = problem.solve().mT  # (heads, hidden)
    mixer.gate.weight.copy_(by_head.repeat_interleave(mixer.attention.dim, 0))


def invert_silu(y: Tensor) -> Tensor:
    """The positive z with silu(z) = y for y > 0, by Newton's method."""
    z = y + 0.5
    for _ in range(NEWTON):
        share = z.sigmoid()
        # The slope is one half at zero and grows, so that the steps stay small.
        z = z - (z * share - y) / (share * (1 + z * (1 - share)))
    return z


def linear_branch(mixer: Mixer) -> Mixer:
    """The linear branch of a gated mixer; any other mixer itself."""
    return mixer.linear if isinstance(mixer, GatedMixer) else mixer


def fit_mixer(
    mixer: Mixer, records: Records, segments: Sequence[Tensor | None]
) -> tuple[bool, float]:
    """Set decays, gates and value maps that best complete the window to the teacher, by head.

    A linear mixer's output is linear in its values. So a (dim, dim) map of the output, found by
    ridge regression, folds into the value projection, or into the output projection where a norm
    stands between; a branch with a norm takes no map.

    Args:
        mixer: as linearized, its projections still the teacher's.
        records: by batch, what the layer got and what its attention was.
        segments: by batch, (batch, time) numbers of documents, or None.

    Returns:
        (whether the maps were folded, the mean of the chosen gate shares).
    """
    linear = linear_branch(mixer)
    gates = gate_candidates(records) if isinstance(mixer, GatedMixer) else None
    if linear.half_lives is not None:
        choose_half_lives(mixer, linear.half_lives, records, segments, gates)

    # Each map takes the gate candidate that leaves the least error.
    solved, errors = solve_value_maps(mixer, records, segments, gates)
    best = errors.argmin(0)  # of (candidates, maps)
    maps = len(best)
    chosen = torch.stack(solved)[best, torch.arange(maps)]
    if gates is None or not isinstance(mixer, GatedMixer):
        return linear.fold_heads(chosen), 1.0

    # Heads that share a map have chosen together, but have gates of their own.
    heads = linear.attention.heads
    per_head = best.repeat_interleave(heads // maps)
    picked = gates[per_head, :, torch.arange(heads)]  # (heads, hidden + 1)
    mixer.gate.weight.copy_(picked[:, :-1])
    mixer.gate.bias.copy_(picked[:, -1])
    return linear.fold_heads(chosen), float(torch.tensor(SHARES, device=best.device)[best].mean())


def choose_half_lives(
    mixer: Mixer,
    candidates: Tensor,
    records: Records,
    segments: Sequence[Tensor | None],
    gates: Tensor | None,
) -> None:
    """Set each state's half-life to the candidate that leaves the least error.

    Args:
        mixer: the mixer.
        candidates: half-lives to try, in tokens (candidates, states).
        records: by batch, what the layer got and what its attention was.
        segments: by batch, numbers of documents.
        gates: gate candidates; each half-life is judged with the best of them.
    """
    linear = linear_branch(mixer)
    states = candidates.shape[1]

    errors = []
    for half_lives in candidates:
        linear.set_half_lives(half_lives)
        left = solve_value_maps(mixer, records, segments, gates)[1].amin(0)  # (maps,)
        errors.append(left.unflatten(0, (states, -1)).sum(1))  # a state may serve several maps

    best = torch.stack(errors).argmin(0)  # of (candidates, states)
    linear.set_half_lives(candidates.gather(0, best[None])[0])


def solve_value_maps(
    mixer: Mixer,
    records: Records,
    segments: Sequence[Tensor | None],
    gates: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """The best value maps for each gate candidate, and how well they do.

    Args:
        mixer: the mixer.
        records: by batch, what the layer got and what its attention was.
        segments: by batch, numbers of documents.
        gates: gate candidates (candidates, hidden + 1, heads); None for a mixer without a gate,
            which counts as one candidate.

    Returns:
        (by candidate, maps (maps, dim, dim); squared errors left, (candidates, maps)).
    """
    linear = linear_branch(mixer)
    maps = linear.attention.heads
    if linear.values_are_linear:  # the maps fold into v, whose heads are shared by groups
        maps = linear.states

    problems = [RidgeRegression() for _ in (SHARES if gates is not None else (1.0,))]
    for (record, seen), ids in zip(records, segments, strict=True):
        context = record.mixer_context(ids)
        out = linear.mix(record.inputs, context, None)[0].float().transpose(1, 2)
        if gates is None or not isinstance(mixer, GatedMixer):
            problems[0].add(*_group_heads(maps, out, seen.heads))
            continue

        # g out W + (1 - g) window = teacher: what is left for W is teacher - (1 - g) window.
        window = mixer.window.mix(record.inputs, context, None)[0].float().transpose(1, 2)
        for problem, candidate in zip(problems, gates, strict=True):
            gate = (_append_ones(record.inputs) @ candidate).sigmoid()  # (batch, time, heads)
            gate = gate.transpose(1, 2).unsqueeze(-1)
            problem.add(*_group_heads(maps, gate * out, seen.heads - (1 - gate) * window))

    # Averages of values, as the teacher's outputs are too, are drawn to the identity, else to zero.
    solved = [problem.solve(prior=float(linear.denominator)) for problem in problems]
    if not (linear.values_are_linear or hasattr(linear, "o_proj")):
        # Nothing can take a map (a branch with a norm): its error is that without one.
        eye = torch.eye(linear.attention.dim, device=solved[0].device)
        solved = [eye.expand_as(found) for found in solved]
    errors = [
        problem.residual_error(found) for problem, found in zip(problems, solved, strict=True)
    ]
    return solved, torch.stack(errors)


def _group_heads(maps: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, heads, time, dim) -> (maps, rows, dim): heads that share a map become rows."""
    return tuple(t.transpose(0, 1).unflatten(0, (maps, -1)).flatten(1, 3) for t in tensors)


@torch.no_grad()
def calibrate(
    slots: list[Any],
    teacher: PreTrainedModel,
    teacher_slots: list[nn.Module],
    batches: list[Batch],
    progress: ProgressCallback = lambda share, message: None,
) -> Iterator[CalibrationRow]:
    """Set gates, decays, write strengths and value maps of every converted layer.

    Gates by Taylor-Calibrate (arXiv 2606.16429), the mixing gate and the value maps by ridge
    regression (this project). A generator: a layer is done when its row is asked for.

    Args:
        slots: the student's attention modules, by layer. The student must be as linearized: its
            projections still the teacher's.
        teacher: the source model.
        teacher_slots: its attention modules, by layer.
        batches: (input_ids, position_ids, segments or None), each (batch, time).
        progress: told the share done after every batch and layer.
    """
    layers = [i for i, slot in enumerate(slots) if isinstance(getattr(slot, "mixer", None), Mixer)]
    total = len(batches) + len(layers)
    with_sinks = [layer for layer in layers if isinstance(slots[layer].mixer, SinkWindow)]
    if with_sinks:
        batches = begin_rows(batches, teacher.config)

    # One pass of the teacher serves all layers; their inputs are kept until their turn.
    captured: dict[int, list[LayerRecord]] = {layer: [] for layer in layers}
    with record_layers(teacher_slots, layers, lambda layer, record: captured[layer].append(record)):
        for done, (input_ids, position_ids, _) in enumerate(batches, 1):
            run_decoder(teacher, input_ids, position_ids)
            progress(done / total, "calibrating")

    segments, starts = [ids for _, _, ids in batches], [find_starts(batch) for batch in batches]
    reaches = source_windows(teacher.config.to_dict()) if with_sinks and batches else []
    for done, layer in enumerate(layers, len(batches) + 1):
        mixer, records = slots[layer].mixer, captured.pop(layer)
        if layer in with_sinks:
            found: SinkFit = fit_sinks(mixer, records, starts, reaches[layer]) if batches else {}
            yield {"layer": layer, "heads_folded": float(bool(found)), **found}
        else:
            yield {"layer": layer, **calibrate_layer(mixer, records, segments)}
        progress(done / total, "calibrating")


def rows_calibrated_together(length: int) -> int:
    """How many rows of `length` tokens a batch for calibration has."""
    return max(1, CALIBRATED_TOGETHER // length)


@torch.no_grad()
def calibrate_layer(
    mixer: Mixer, records: list[LayerRecord], segments: list[Tensor | None]
) -> MixerCalibration:
    """Set one mixer's start from what its layer got and gave.

    RegraftError when the mixer inherits too little of the teacher's attention.

    Args:
        mixer: as linearized, its projections still the teacher's.
        records: by batch, what the teacher's attention got and gave.
        segments: by batch, (batch, time) numbers of documents, or None.
    """
    linear = linear_branch(mixer)
    if isinstance(linear, SinkWindow):
        raise RegraftError(
            f"the sinks of '{linear.name}' are measured on whole models whose texts begin alike:"
            " regraft linearize --data does that, leave calibration out here (0 tokens)"
        )
    # A window has nothing of its own to set, and without q, k, v there is nothing of the source.
    if linear.name == "window" or not hasattr(linear, "q_proj"):
        return {"heads_folded": 0.0}
    if not parse_inherit(linear.inherit) >= {"q", "k", "v"}:
        raise RegraftError(
            "calibration sees the teacher's attention in inherited q, k and v, "
            f"mixers inherit '{linear.inherit}': leave calibration out (0 tokens)"
        )

    window, sinks = 0, 0
    if isinstance(mixer, GatedMixer):
        window, sinks = mixer.window.options.window, mixer.window.options.sinks
    pairs = [
        (record, compute_attention_statistics(linear, record, ids, window, sinks))
        for record, ids in zip(records, segments, strict=True)
    ]

    # Means by head over all tokens, (heads,).
    mass = torch.stack([seen.outside.mean((0, 2)) for _, seen in pairs]).mean(0)
    summed = torch.stack([seen.distance.mean((0, 2)) for _, seen in pairs]).mean(0)
    entropy = torch.stack([seen.entropy.mean((0, 2)) for _, seen in pairs]).mean(0)
    distance = summed / mass.clamp(min=1e-6)

    linear.fit_inputs(torch.cat([record.inputs.flatten(0, 1) for record in records]))

    # Gates first: the value maps are fitted to the outputs that they give.
    linear.start_gates(distance.clamp(min=1.0), entropy.clamp(0, 1))
    if isinstance(linear, LinearAttention) and linear.normed_gate:
        fit_output_gate(linear, pairs)
    folded, share = fit_mixer(mixer, pairs, segments)
    return {
        "outside_window": float(mass.mean()),
        "mean_distance": float(distance.mean()),
        "entropy": float(entropy.mean()),
        "half_life": math.log(2) / float((math.log(2) / distance).clamp(1e-3, 5.0).mean()),
        "gate_share": share,
        "heads_folded": float(folded),
    }


def output_error(mixer: Mixer, record: LayerRecord, context: MixerContext) -> Tensor:
    """Squared error of a mixer's output relative to the teacher's, the mean over rows, a scalar.

    0 is perfect, 1 as good as silence.
    """
    y, _ = mixer(record.inputs, context)
    return relative_squared_error(y.float(), record.outputs.float())


def relative_squared_error(value: Tensor, target: Tensor) -> Tensor:
    """||value - target||^2 / ||target||^2 of each row (batch, ...), the mean over the batch."""
    error, energy = ((part.square().flatten(1).sum(1)) for part in (value - target, target))
    return (error / energy.clamp(min=1e-12)).mean()
