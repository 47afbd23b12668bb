"""A closed-form start for a fresh mixer, measured on the teacher's own attention; no gradient step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RegraftError
from ..mixers.base import Mixer, MixerContext, apply_rotary
from ..mixers.gated import GatedMixer
from ..mixers.inherit import parse_inherit
from .hooks import LayerRecord, record_layers, run_decoder

RIDGE = 1e-3
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
GATE_RANGE = (0.01, 0.9)


@dataclass
class AttentionStatistics:
    """One teacher layer on one batch: what each head attends to and what it reads; all float32."""

    heads: Tensor  # (batch, heads, time, dim): the teacher's per-head outputs
    outside: Tensor  # (batch, heads, time): attention mass beyond the window and sinks
    distance: Tensor  # (batch, heads, time): distance summed over that mass
    entropy: Tensor  # (batch, heads, time): attention entropy over log(tokens seen)


def compute_attention_statistics(
    mixer: Mixer, record: LayerRecord, segments: Tensor | None, window: int, sinks: int
) -> AttentionStatistics:
    """Softmax attention from the mixer's inherited projections, before anything was folded or trained."""
    q, k, v = mixer.qkv(record.inputs)
    q, k = apply_rotary(q, record.rotary), apply_rotary(k, record.rotary)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    time = q.shape[2]
    index = torch.arange(time, device=q.device)
    distance = index.unsqueeze(-1) - index
    seen = (distance >= 0).unsqueeze(0)
    start = torch.zeros(q.shape[0], time, dtype=torch.long, device=q.device)
    if segments is not None:
        seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
        start = seen.long().argmax(-1)
    scores = (q @ k.transpose(-1, -2)) * mixer.attention.scale
    weight = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    far = ((distance >= window) & ((index - start.unsqueeze(-1)) >= sinks)).unsqueeze(1) * weight
    count = (index - start + 1).clamp(min=2).unsqueeze(1)
    entropy = -torch.special.xlogy(weight, weight).sum(-1) / count.log()
    return AttentionStatistics(weight @ v, far.sum(-1), (far * distance).sum(-1), entropy)


class RidgeRegression:
    """Running normal equations of ridge regressions side by side: features (..., n, f) -> targets (..., n, t)."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """More rows."""
        self.gram = self.gram + features.mT @ features
        self.cross = self.cross + features.mT @ targets
        self.energy = self.energy + targets.square().sum((-2, -1))

    def solve(self, ridge: float = RIDGE, prior: float = 0.0) -> Tensor:
        """Coefficients (..., f, t); the penalty on what differs from `prior` times the unit matrix is `ridge` times the
        features' mean square.
        """
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        penalty = (ridge * scale + 1e-12) * torch.eye(gram.shape[-1], device=gram.device)
        return torch.linalg.solve(gram + penalty, cross + prior * penalty if prior else cross)

    def residual_error(self, found: Tensor) -> Tensor:
        """Squared error that these coefficients leave, (...)."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        explained = 2 * (found * cross).sum((-2, -1)) - (found * (gram @ found)).sum((-2, -1))
        return torch.as_tensor(self.energy) - explained


def gate_candidates(records: list[tuple[LayerRecord, AttentionStatistics]]) -> Tensor:
    """Gate weights and bias, (candidates, hidden + 1, heads), for g = share x attention mass outside the window.

    Softmax attention is exactly (1 - m) window + m rest, so m is the right gate for a linear branch that gives the
    rest; smaller shares suit one that does not. Ridge regression of logit(share x m) on the layer's input.
    """
    fits = []
    for share in SHARES:
        moments = RidgeRegression()
        for record, seen in records:
            target = (share * seen.outside).clamp(*GATE_RANGE).logit().transpose(1, 2).flatten(0, 1)
            moments.add(_append_ones(record.inputs).flatten(0, 1), target)
        fits.append(moments.solve())
    return torch.stack(fits)


def _append_ones(x: Tensor) -> Tensor:
    return torch.cat((x.float(), torch.ones_like(x[..., :1])), dim=-1)


def fit_mixer(
    mixer: Mixer,
    records: list[tuple[LayerRecord, AttentionStatistics]],
    segments: list[Tensor | None],
) -> tuple[bool, float]:
    """Decays, gates and value maps that best complete the window's output to the teacher's, head by head.

    A linear mixer's output is linear in its values, so a dim x dim map of it, found by ridge regression, folds into the
    value projection (or the output projection where a norm stands between; a branch with a norm takes no map). Averages
    of values, as the teacher's outputs are too, are drawn towards what they are. Of the half-lives that learned decays
    may begin with, each state takes the one that leaves the least error, then of the gate candidates each group of
    heads. Returns whether the maps were folded, and the mean share chosen.
    """
    linear = mixer.linear if isinstance(mixer, GatedMixer) else mixer
    heads = linear.attention.heads
    gates = gate_candidates(records) if isinstance(mixer, GatedMixer) else None
    if (tokens := linear.half_lives) is not None:
        tried = []
        for candidate in tokens:
            linear.set_half_lives(candidate)
            left = solve_value_maps(mixer, records, segments, gates)[1].amin(0)
            tried.append(left.unflatten(0, (tokens.shape[1], -1)).sum(1))
        best = torch.stack(tried).argmin(0)
        linear.set_half_lives(tokens.gather(0, best[None])[0])
    solved, left = solve_value_maps(mixer, records, segments, gates)
    best = left.argmin(0)  # of (candidates, maps)
    maps = len(best)
    chosen = torch.stack(solved)[best, torch.arange(maps)]
    if gates is None or not isinstance(mixer, GatedMixer):
        return linear.fold_heads(chosen), 1.0
    per_head = best.repeat_interleave(heads // maps)
    picked = gates[per_head, :, torch.arange(heads)]  # (heads, hidden + 1)
    mixer.gate.weight.copy_(picked[:, :-1])
    mixer.gate.bias.copy_(picked[:, -1])
    return linear.fold_heads(chosen), float(torch.tensor(SHARES)[best].mean())


def solve_value_maps(
    mixer: Mixer,
    records: list[tuple[LayerRecord, AttentionStatistics]],
    segments: list[Tensor | None],
    gates: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """By gate candidate, value maps (maps, dim, dim) and the squared error left, (candidates, maps)."""
    linear = mixer.linear if isinstance(mixer, GatedMixer) else mixer
    maps = (
        linear.qkv.v.out_features // linear.attention.dim
        if linear.values_are_linear
        else linear.attention.heads
    )
    moments = [RidgeRegression() for _ in SHARES] if gates is not None else [RidgeRegression()]
    for (record, seen), ids in zip(records, segments, strict=True):
        mixing = record.mixer_context(ids)
        out = linear.mix(record.inputs, mixing, None)[0].float().transpose(1, 2)
        if gates is None or not isinstance(mixer, GatedMixer):
            moments[0].add(*_group_heads(maps, out, seen.heads))
            continue
        window = mixer.window.mix(record.inputs, mixing, None)[0].float().transpose(1, 2)
        for index, candidate in enumerate(gates):
            gate = (_append_ones(record.inputs) @ candidate).sigmoid().transpose(1, 2).unsqueeze(-1)
            moments[index].add(*_group_heads(maps, gate * out, seen.heads - (1 - gate) * window))
    solved = [problem.solve(prior=float(linear.denominator)) for problem in moments]
    if not (linear.values_are_linear or hasattr(linear, "o")):
        solved = [torch.eye(linear.attention.dim).expand_as(found) for found in solved]
    return solved, torch.stack(
        [problem.residual_error(found) for problem, found in zip(moments, solved, strict=True)]
    )


def _group_heads(maps: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, heads, time, dim) -> (maps, rows, dim): the rows of heads that share a map side by side."""
    return tuple(t.transpose(0, 1).unflatten(0, (maps, -1)).flatten(1, 3) for t in tensors)


@torch.no_grad()
def calibrate(
    slots: list[Any],
    teacher: PreTrainedModel,
    teacher_slots: list[nn.Module],
    batches: list[tuple[Tensor, Tensor, Tensor | None]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, float]]:
    """Set gates, decays, write strengths and value maps of every converted layer; yields one row per layer.

    `batches`: (input_ids, position_ids, segments or None), each (batch, time). The student must be as linearized:
    its projections still the teacher's. Gates by Taylor-Calibrate (arXiv 2606.16429), the mixing gate and the value
    maps by ridge regression (this project).
    """
    layers = [i for i, slot in enumerate(slots) if isinstance(getattr(slot, "mixer", None), Mixer)]
    captured: dict[int, list[LayerRecord]] = {layer: [] for layer in layers}
    with record_layers(teacher_slots, layers, lambda layer, record: captured[layer].append(record)):
        for done, (input_ids, position_ids, _) in enumerate(batches):
            run_decoder(teacher, input_ids, position_ids)
            progress(done + 1, len(batches) + len(layers))
    segments = [ids for _, _, ids in batches]
    for done, layer in enumerate(layers):
        yield {"layer": layer, **calibrate_layer(slots[layer].mixer, captured.pop(layer), segments)}
        progress(len(batches) + done + 1, len(batches) + len(layers))


@torch.no_grad()
def calibrate_layer(
    mixer: Mixer, records: list[LayerRecord], segments: list[Tensor | None]
) -> dict[str, float]:
    """One mixer's start from what its layer saw and gave; `segments` by record. RegraftError when it inherits too
    little of the teacher's attention.
    """
    linear = mixer.linear if isinstance(mixer, GatedMixer) else mixer
    if linear.name == "window" or not hasattr(
        linear, "qkv"
    ):  # nothing of its own to set, or nothing of the source
        return {"heads_folded": 0.0}
    if not parse_inherit(linear.inherit) >= {"q", "k", "v"}:
        raise RegraftError(
            f"calibration sees the teacher's attention in inherited q, k and v, mixers inherit '{linear.inherit}': "
            "leave calibration out (0 tokens)"
        )
    window, sinks = (
        (mixer.window.options.window, mixer.window.options.sinks)
        if isinstance(mixer, GatedMixer)
        else (0, 0)
    )
    pairs = [
        (r, compute_attention_statistics(linear, r, ids, window, sinks))
        for r, ids in zip(records, segments, strict=True)
    ]
    mass = torch.stack([seen.outside.mean((0, 2)) for _, seen in pairs]).mean(0)
    distance = torch.stack([seen.distance.mean((0, 2)) for _, seen in pairs]).mean(0) / mass.clamp(
        min=1e-6
    )
    entropy = torch.stack([seen.entropy.mean((0, 2)) for _, seen in pairs]).mean(0)
    linear.start_gates(distance.clamp(min=1.0), entropy.clamp(0, 1))
    folded, share = fit_mixer(mixer, pairs, segments)
    return {
        "outside_window": float(mass.mean()),
        "mean_distance": float(distance.mean()),
        "entropy": float(entropy.mean()),
        "half_life": math.log(2) / float((math.log(2) / distance).clamp(1e-3, 5.0).mean()),
        "gate_share": share,
        "heads_folded": float(folded),
    }


def output_error(mixer: Mixer, record: LayerRecord, mixing: MixerContext) -> Tensor:
    """Squared error of the mixer's output relative to the teacher's, the mean over rows: 0 perfect, 1 as silence."""
    y, _ = mixer(record.inputs, mixing)
    return relative_squared_error(y.float(), record.outputs.float())


def relative_squared_error(value: Tensor, target: Tensor) -> Tensor:
    """||value - target||^2 / ||target||^2 of each row (batch, ...), the mean over the batch: a scalar."""
    gap, whole = ((part.square().flatten(1).sum(1)) for part in (value - target, target))
    return (gap / whole.clamp(min=1e-12)).mean()
