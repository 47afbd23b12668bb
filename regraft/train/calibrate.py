"""Calibration: a closed-form start of a new mixer from its teacher's attention, no gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
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
from .attention_statistics import compute_attention_statistics
from .fit_mixer import fit_mixer, fit_output_gate, linear_branch
from .hooks import LayerRecord, record_layers, run_decoder
from .sinks import Batch, SinkFit, begin_rows, find_starts, fit_sinks

CALIBRATED_TOGETHER = 1024  # tokens of a batch, where rows are not longer
TEACHER_SHARE = 1 / 3  # of limited seconds, for what the teacher's layers get and give


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
    tokens: int  # that it was calibrated on


@torch.no_grad()
def calibrate(
    slots: list[Any],
    teacher: PreTrainedModel,
    teacher_slots: list[nn.Module],
    batches: list[Batch],
    progress: ProgressCallback = lambda share, message: None,
    seconds: float | None = None,
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
        seconds: what it may take. Where the first batches and the first layer show that all would
            take longer, the rest of the batches is left out. None: no limit.
    """
    begin = time.monotonic()
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
            if seconds is not None and time.monotonic() - begin > TEACHER_SHARE * seconds:
                batches = batches[:done]
                break

    segments, starts = [ids for _, _, ids in batches], [find_starts(batch) for batch in batches]
    reaches = source_windows(teacher.config.to_dict()) if with_sinks and batches else []
    for done, layer in enumerate(layers, 1):
        start, left = time.monotonic(), len(layers) - done
        mixer, records = slots[layer].mixer, captured.pop(layer)[: len(segments)]
        tokens = sum(ids.numel() for ids, _, _ in batches[: len(segments)])
        if layer in with_sinks:
            found: SinkFit = fit_sinks(mixer, records, starts, reaches[layer]) if batches else {}
            yield {"layer": layer, "tokens": tokens, "heads_folded": float(bool(found)), **found}
        else:
            yield {"layer": layer, "tokens": tokens, **calibrate_layer(mixer, records, segments)}
        progress((len(batches) + done) / total, "calibrating")

        # Layers cost alike.
        now = time.monotonic()
        coming = left * (now - start)
        if seconds is not None and coming > (rest := max(begin + seconds - now, 0.0)):
            kept = max(1, int(len(segments) * rest / coming))
            segments, starts = segments[:kept], starts[:kept]


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
    if linear.name == "window" or not hasattr(linear, "states"):
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
