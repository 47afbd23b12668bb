"""What a stage of uptraining is: its loss, its budget, its learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RegraftError
from ..hosts.modeling_regraft import RegraftForCausalLM
from ..mixers.base import Attention, Mixer
from ..mixers.registry import weights
from .calibrate import error
from .capture import LayerRecord, body, recording
from .data import Packed
from .kl import head_kl


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `kind`: `align` (each mixer matches its teacher layer's output on the teacher's input; mixers only), `distil` (KL to
    the teacher's full distribution) or `next` (next-token cross-entropy). `tokens`: budget; `length` and `batch`:
    tokens a row and rows a step. Learning rates: `lr_new` for weights the source does not have, `lr_mixer` for
    inherited weights inside mixers, `lr_body` for everything else (0 leaves it frozen). `warmup` and `cooldown` are
    shares of the steps, constant between, linear to zero at the end. `precision`: `float32`, `bfloat16` (autocast; the
    head stays float32) or `auto` (bfloat16 where this machine multiplies it faster).
    """

    kind: Literal["align", "distil", "next"]
    tokens: int
    length: int = 1024
    batch: int = 1
    lr_new: float = 1e-3
    lr_mixer: float = 3e-4
    lr_body: float = 3e-5
    warmup: float = 0.05
    cooldown: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16", "auto"] = "auto"

    def __post_init__(self) -> None:
        if self.tokens < self.length * self.batch:
            step = f"{self.batch} x {self.length}"
            raise RegraftError(f"stage '{self.kind}' has {self.tokens} tokens, less than one step of {step}: give more")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.length * self.batch)

    def rate(self, step: int) -> float:
        """Learning-rate factor at a step, in (0, 1]."""
        warm, cool = max(1, round(self.warmup * self.steps)), max(1, round(self.cooldown * self.steps))
        return min(1.0, (step + 1) / warm, (self.steps - step) / cool)


def parameter_groups(model: PreTrainedModel, stage: Stage) -> list[dict[str, object]]:
    """AdamW groups by origin (new, mixer, body) and by decay: none on gains, biases, gates and decays.

    Sets `requires_grad` so that only what the stage trains has gradients. Where a weight came from is read from the
    mixers' own tables, never from names.
    """
    origin: dict[int, tuple[str, bool]] = {}
    for spec, attention, slot in zip(model.config.mixers, model.config.attention, model.slots(), strict=True):
        for name, weight in (weights(spec, Attention(**attention)) if spec else {}).items():
            parameter = slot.mixer.get_parameter(name)
            origin[id(parameter)] = ("mixer" if weight.source else "new", weight.decay)
    rates = {"new": stage.lr_new, "mixer": stage.lr_mixer, "body": 0.0 if stage.kind == "align" else stage.lr_body}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kind, decay = origin.get(id(parameter), ("body", parameter.ndim > 1))
        parameter.requires_grad_(rates[kind] > 0)
        if rates[kind] > 0:
            groups.setdefault((kind, decay), []).append(parameter)
    if not groups:
        raise RegraftError(f"stage '{stage.kind}' trains nothing: all learning rates are 0 or no layer has a mixer")
    return [
        {
            "params": ps,
            "name": kind,
            "peak": rates[kind],
            "lr": rates[kind],
            "weight_decay": stage.weight_decay if decay else 0.0,
        }
        for (kind, decay), ps in groups.items()
    ]


def last_hidden(model: PreTrainedModel, rows: Packed, fast: bool) -> Tensor:
    """The decoder's output before the head, (batch, time, hidden) in float32."""
    run = model.hidden if isinstance(model, RegraftForCausalLM) else partial(model.get_decoder(), use_cache=False)
    with torch.autocast(rows.input_ids.device.type, torch.bfloat16, enabled=fast):
        return run(input_ids=rows.input_ids, position_ids=rows.position_ids).last_hidden_state.float()


def align_step(
    model: PreTrainedModel, teacher: PreTrainedModel, teacher_slots: list[nn.Module], rows: Packed, fast: bool
) -> float:
    """One forward of the teacher's body; each mixer's relative squared error is backpropagated on its own.

    Returns the mean over converted layers.
    """
    mixers = {i: slot.mixer for i, slot in enumerate(model.slots()) if isinstance(getattr(slot, "mixer", None), Mixer)}
    segments, losses = rows.segments(), []

    def learn(layer: int, record: LayerRecord) -> None:
        with torch.enable_grad(), torch.autocast(rows.input_ids.device.type, torch.bfloat16, enabled=fast):
            loss = error(mixers[layer], record, record.mixing(segments))
        loss.backward()
        losses.append(float(loss.detach()))

    with (
        recording(teacher_slots, list(mixers), learn),
        torch.autocast(rows.input_ids.device.type, torch.bfloat16, enabled=fast),
    ):
        body(teacher, rows.input_ids, rows.position_ids)
    return sum(losses) / len(losses)


def distil_step(model: PreTrainedModel, teacher: PreTrainedModel, rows: Packed, fast: bool) -> float:
    """KL(teacher || student) per token over the whole vocabulary, backpropagated; returns it."""
    with torch.no_grad():
        target = last_hidden(teacher, rows, fast)
    student = last_hidden(model, rows, fast)
    loss = head_kl(student, model.get_output_embeddings(), target, teacher.get_output_embeddings(), fast)
    loss.backward()
    return float(loss.detach())


def next_step(model: PreTrainedModel, rows: Packed, fast: bool) -> float:
    """Cross-entropy of the next token within its document, backpropagated; returns it."""
    logits = model.get_output_embeddings()(last_hidden(model, rows, fast)[:, :-1])
    labels = rows.input_ids[:, 1:].masked_fill(rows.position_ids[:, 1:] == 0, -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach())


def finite(loss: float, stage: Stage, step: int) -> float:
    """The loss, or RegraftError when it is not a number."""
    if not math.isfinite(loss):
        raise RegraftError(
            f"loss of stage '{stage.kind}' is {loss} at step {step}: lower its learning rates and run again"
        )
    return loss
