"""A closed-form start for a fresh mixer, measured on the teacher's own attention; no gradient step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mixers.base import Mixer, Mixing, rotate
from ..mixers.gated import Gated
from .capture import LayerRecord, body, recording

RIDGE = 1e-3


@dataclass
class Attended:
    """One teacher layer on one batch: what each head attends to and what it reads; all float32."""

    heads: Tensor  # (batch, heads, time, dim): the teacher's per-head outputs
    outside: Tensor  # (batch, heads, time): attention mass beyond the window and sinks
    distance: Tensor  # (batch, heads, time): distance summed over that mass
    entropy: Tensor  # (batch, heads, time): attention entropy over log(tokens seen)


def attend(mixer: Mixer, record: LayerRecord, segments: Tensor | None, window: int, sinks: int) -> Attended:
    """Softmax attention from the mixer's inherited projections, before anything was folded or trained."""
    q, k, v = mixer.qkv(record.inputs)
    q, k = rotate(q, record.rotary), rotate(k, record.rotary)
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
    return Attended(weight @ v, far.sum(-1), (far * distance).sum(-1), entropy)


class Moments:
    """Running normal equations for ridge regression: features (n, f) -> targets (n, t)."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Leading axes beyond the last two are independent problems."""
        self.gram = self.gram + features.mT @ features
        self.cross = self.cross + features.mT @ targets

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """Coefficients (f, t); the penalty is `ridge` times the mean square of the features."""
        gram = torch.as_tensor(self.gram)
        size = gram.shape[-1]
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(size, device=gram.device)
        return torch.linalg.solve(gram + (ridge * scale + 1e-12) * eye, torch.as_tensor(self.cross))


def fit_gate(gated: Gated, records: list[tuple[LayerRecord, Attended]], low: float = 0.01, high: float = 0.9) -> None:
    """The gate's target is known: softmax attention is (1 - m) window + m rest, m the mass outside the window.

    Ridge regression of logit(m), clamped to [low, high], on the layer's input.
    """
    moments = Moments()
    for record, seen in records:
        x = record.inputs.float().flatten(0, 1)
        features = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        moments.add(features, seen.outside.clamp(low, high).logit().transpose(1, 2).flatten(0, 1))
    solution = moments.solve()
    gated.gate.weight.copy_(solution[:-1].T)
    gated.gate.bias.copy_(solution[-1])


def fit_heads(mixer: Mixer, linear: Mixer, records: list[tuple[LayerRecord, Attended]], segments: list[Tensor | None]) -> bool:
    """Per head, the dim x dim map of the linear branch's output that best completes the window's to the teacher's.

    A linear mixer's output is linear in its values, so the map folds into the value projection.
    """
    moments = Moments()
    for (record, seen), ids in zip(records, segments, strict=True):
        mixing = record.mixing(ids)
        out = linear.mix(record.inputs, mixing, None)[0].float().transpose(1, 2)
        target = seen.heads
        if isinstance(mixer, Gated):
            gate = mixer.gate(record.inputs).float().sigmoid().transpose(1, 2).unsqueeze(-1)
            window = mixer.window.mix(record.inputs, mixing, None)[0].float().transpose(1, 2)
            out, target = gate * out, target - (1 - gate) * window
        values = linear.qkv.v.out_features // linear.attention.dim if linear.values_are_linear else out.shape[1]
        out, target = (t.transpose(0, 1).unflatten(0, (values, -1)).flatten(1, 3) for t in (out, target))
        moments.add(out, target)
    return linear.fold_heads(moments.solve()) if linear is not mixer else mixer.fold_heads(moments.solve())


@torch.no_grad()
def calibrate(
    slots: list[nn.Module],
    teacher: nn.Module,
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
    with recording(teacher_slots, layers, lambda layer, record: captured[layer].append(record)):
        for done, (input_ids, position_ids, _) in enumerate(batches):
            body(teacher, input_ids, position_ids)
            progress(done + 1, len(batches) + len(layers))
    segments = [ids for _, _, ids in batches]
    for done, layer in enumerate(layers):
        yield {"layer": layer, **_calibrate_layer(slots[layer].mixer, captured.pop(layer), segments)}
        progress(len(batches) + done + 1, len(batches) + len(layers))


def _calibrate_layer(mixer: Mixer, records: list[LayerRecord], segments: list[Tensor | None]) -> dict[str, float]:
    gated = isinstance(mixer, Gated)
    linear: Mixer = mixer.linear if gated else mixer
    if linear.name == "window":
        return {"heads_folded": 0.0}
    window, sinks = (mixer.window.options.window, mixer.window.options.sinks) if gated else (0, 0)
    pairs = [(r, attend(linear, r, ids, window, sinks)) for r, ids in zip(records, segments, strict=True)]
    mass = torch.stack([seen.outside.mean((0, 2)) for _, seen in pairs]).mean(0)
    distance = torch.stack([seen.distance.mean((0, 2)) for _, seen in pairs]).mean(0) / mass.clamp(min=1e-6)
    entropy = torch.stack([seen.entropy.mean((0, 2)) for _, seen in pairs]).mean(0)
    linear.start_gates(distance.clamp(min=1.0), entropy.clamp(0, 1))
    if gated:
        fit_gate(mixer, pairs)
    folded = fit_heads(mixer, linear, pairs, segments)
    return {
        "outside_window": float(mass.mean()),
        "mean_distance": float(distance.mean()),
        "entropy": float(entropy.mean()),
        "half_life": math.log(2) / float((math.log(2) / distance).clamp(1e-3, 5.0).mean()),
        "heads_folded": float(folded),
    }


def error(mixer: Mixer, record: LayerRecord, mixing: Mixing) -> Tensor:
    """Squared error of the mixer's output relative to the teacher's, a scalar: 0 perfect, 1 as good as silence."""
    y, _ = mixer(record.inputs, mixing)
    target = record.outputs.float()
    return (y.float() - target).square().sum() / target.square().sum().clamp(min=1e-12)
