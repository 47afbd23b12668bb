"""What a stage of uptraining is: its loss, its budget, its learning rates."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.packing import Packed
from ..errors import RegraftError
from ..mixers.base import Attention
from ..mixers.registry import weights
from ..modeling.modeling_regraft import RegraftForCausalLM
from .fsdp_forward import run_in_forward
from .kl import head_kl
from .lit import Lit
from .objectives import IGNORED, Kind, last_hidden
from .teacher_cache import CachedTeacher, Teacher

LOW_RANK = "low_rank"  # where a model holds its low-rank additions
LAYERWISE = ("matrix", "align")  # each mixer is matched to its teacher's layer on its own


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `kind`: `matrix` (each mixer matches the softmax matrices of its teacher layer), `align` (each mixer matches its
    teacher layer's output; both on the teacher's input and for mixers only), `distil` (KL to
    the teacher's full distribution), `next` (next-token cross-entropy), `mask` (BERT's masked tokens, `mask_share` of
    them) or `image` (the class). `tokens`: budget; `length` and `batch`: tokens a row and rows a step; for `image` the
    budget counts images and the length is 1. Learning rates: `lr_new` for weights the source does not have, `lr_mixer`
    for inherited weights inside mixers, `lr_body` for everything else (0 leaves it frozen; None: 3e-5, or 3e-4 for a
    model without mixers). `warmup` and `cooldown` are shares of the steps, constant between, linear to zero at the end.
    Dropout is off. `precision`: `float32`, `bfloat16` (autocast; a decoder's head stays float32) or `auto` (bfloat16
    where this machine multiplies it faster).

    For models without mixers. `layers`: `all`; `bottom:N`, the sub-model of the first N layers with embeddings and head
    (bert2BERT's first stage, arXiv 2110.07143); `train:A-B` or `train:A,B,..`, counted from 0: all run, these and the
    untied parts of the head learn (MSLT, arXiv 2011.13635; LLaMA Pro's new blocks, arXiv 2401.02415). `layer_drop`:
    largest probability that a layer is left out of a step (progressive layer dropping, arXiv 2010.13369). `token_drop`:
    share of the tokens that skip the middle layers (arXiv 2203.13240, here drawn at random). LiGO combines its growth
    with a layer_drop of 0.1 and a token_drop of 0.15.

    For models with mixers. `rank`: above 0, inherited projections inside mixers learn low-rank additions (`lowrank`, at
    `lr_mixer`), new weights at `lr_new`, and nothing else learns. `ce`: weight of next-token cross-entropy in `distil`,
    the KL has the rest. `window_drop`: probability that a gated layer runs in a step without its window, so that the
    state is used (window dropout, arXiv 2510.05901, here per layer and step). `learn`: `all`; `new`, whatever was
    copied from the source stays as it is; or `lit`, which begins like `new` and lets everything learn once the loss
    hardly falls (XATL, arXiv 2404.02684; `lit` says when).
    """

    kind: Literal["matrix", "align", "distil", "next", "mask", "image"]
    tokens: int
    length: int = 1024
    batch: int = 1
    lr_new: float = 1e-3
    lr_mixer: float = 3e-4
    lr_body: float | None = None
    warmup: float = 0.05
    cooldown: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    mask_share: float = 0.15
    layer_drop: float = 0.0
    token_drop: float = 0.0
    layers: str = "all"
    ce: float = 0.0
    rank: int = 0
    window_drop: float = 0.0
    learn: Literal["all", "new", "lit"] = "all"
    lit: Lit = Lit()

    def __post_init__(self) -> None:
        if self.kind == "image":
            object.__setattr__(self, "length", 1)
        if min(self.length, self.batch) < 1:
            raise RegraftError(
                f"stage '{self.kind}' has {self.batch} rows of {self.length} a step: give 1 or more"
            )
        if not re.fullmatch(r"all|bottom:\d+|train:\d+(-\d+)?(,\d+(-\d+)?)*", self.layers):
            raise RegraftError(
                f"layers is '{self.layers}': give all, bottom:N, train:A-B or train:A,B,.."
            )
        if not (0 <= self.layer_drop < 1 and 0 <= self.token_drop < 1):
            raise RegraftError(
                f"layer_drop {self.layer_drop}, token_drop {self.token_drop}: give shares from 0, below 1"
            )
        if not (0 <= self.ce < 1 and 0 <= self.window_drop < 1) or (
            self.ce and self.kind != "distil"
        ):
            raise RegraftError(
                f"stage '{self.kind}' has ce {self.ce}, window_drop {self.window_drop}: both are from 0, below 1, and "
                "ce is for distil"
            )
        if self.rank < 0 or (self.rank and (self.learn != "all" or self.kind in LAYERWISE)):
            raise RegraftError(
                f"stage '{self.kind}' has rank {self.rank} and learn '{self.learn}': a rank is 0 or more, with learn "
                "'all', in stages of the whole model"
            )
        if not 0 < self.mask_share <= 1:
            raise RegraftError(
                f"mask_share is {self.mask_share}: give a share of the tokens above 0, at most 1"
            )
        if self.tokens < self.length * self.batch:
            step = f"{self.batch} x {self.length}"
            raise RegraftError(
                f"stage '{self.kind}' has {self.tokens} {self.unit}, less than one step of {step}: give more"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.length * self.batch)

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return "images" if self.kind == "image" else "tokens"

    @property
    def objective(self) -> Kind:
        """What tells on held-out rows how far the stage has come."""
        return self.kind if self.kind == "mask" or self.kind == "image" else "next"

    def lr_factor(self, step: int, since: int | None = None) -> float:
        """Learning-rate factor at a step, in (0, 1]; of weights that learn `since` a later step with their warm-up."""
        if since is not None and step < (end := min(since + self.lit.warmup, self.steps)):
            return self.lr_factor(end - 1) * (step + 1 - since) / (end - since)
        warm, cool = (
            max(1, round(self.warmup * self.steps)),
            max(1, round(self.cooldown * self.steps)),
        )
        return min(1.0, (step + 1) / warm, (self.steps - step) / cool)


def parameter_groups(
    model: PreTrainedModel, stage: Stage, frozen: Collection[int] = ()
) -> list[dict[str, object]]:
    """AdamW groups by origin (new, mixer, body) and by decay: none on gains, biases, gates and decays.

    `frozen`: identities of parameters that do not learn.

    Sets `requires_grad` so that only what the stage trains has gradients. Where a weight came from is read from the
    mixers' own tables, never from names; a model without mixers is all body.
    """
    mixing = isinstance(model, RegraftForCausalLM)
    origin = parameter_origins(model) if mixing else {}
    if stage.rank:
        origin |= dict.fromkeys(model.get_submodule(LOW_RANK).trainable_ids(), ("low rank", True))
    return build_groups(model.parameters(), origin, stage, mixing, frozen)


def build_groups(
    parameters: Iterable[nn.Parameter],
    origin: Mapping[int, tuple[str, bool]],
    stage: Stage,
    mixing: bool,
    frozen: Collection[int] = (),
) -> list[dict[str, object]]:
    """The groups of these parameters, whose `origin` says where they are from; see `parameter_groups`."""
    body = stage.lr_body if stage.lr_body is not None else 3e-5 if mixing else 3e-4
    rates = {
        "new": stage.lr_new,
        "mixer": stage.lr_mixer,
        "body": 0.0 if stage.kind in LAYERWISE else body,
    }
    if stage.learn != "all" or stage.rank:
        rates |= {"mixer": 0.0, "body": 0.0}
    if stage.rank:
        rates["low rank"] = stage.lr_mixer
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind, decay = origin.get(id(parameter), ("body", parameter.ndim > 1))
        learns = rates[kind] > 0 and id(parameter) not in frozen
        parameter.requires_grad_(learns)
        if learns:
            groups.setdefault((kind, decay), []).append(parameter)
    if not groups:
        raise RegraftError(
            f"stage '{stage.kind}' trains nothing: all learning rates are 0, no layer has a mixer, or learn is "
            f"'{stage.learn}' and nothing is new"
        )
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


def projection_names(model: PreTrainedModel) -> list[str]:
    """Names of the matrices inside mixers that come from the source."""
    origin = parameter_origins(model)
    named = model.named_parameters()
    return [name for name, p in named if origin.get(id(p), ("",))[0] == "mixer" and p.ndim == 2]


def unfreeze(
    model: PreTrainedModel, stage: Stage, optimizer: torch.optim.Optimizer, since: int
) -> None:
    """What a stage has frozen so far learns `since` a step: groups of their own, with no moments and a warm-up."""
    for group in parameter_groups(model, replace(stage, learn="all")):
        if group["name"] != "new":
            optimizer.add_param_group(group | {"since": since})


def parameter_origins(model: PreTrainedModel) -> dict[int, tuple[str, bool]]:
    """By identity of every parameter inside a mixer: "mixer" when inherited, else "new", and whether it decays."""
    found: dict[int, tuple[str, bool]] = {}
    for spec, attention, slot in zip(
        model.config.mixers, model.config.attention, model.slots(), strict=True
    ):
        found |= mixer_parameter_origins(slot.mixer, spec, Attention(**attention)) if spec else {}
    return found


def mixer_parameter_origins(
    mixer: nn.Module, spec: dict[str, Any], attention: Attention
) -> dict[int, tuple[str, bool]]:
    """The same for one mixer, built by this spec."""
    table = weights(spec, attention).items()
    return {
        id(mixer.get_parameter(name)): ("mixer" if w.source else "new", w.decay)
        for name, w in table
    }


def distil_step(
    model: PreTrainedModel,
    teacher: Teacher,
    rows: Packed,
    fast: bool,
    ce: float = 0.0,
    labels: Tensor | None = None,
    shares: tuple[float, float] = (1.0, 1.0),
) -> float:
    """(1 - ce) KL(teacher || student) per token over the whole vocabulary, or over what a teacher behind a cache keeps,
    + ce x next-token cross-entropy; the sum is backpropagated and returned. `labels`: of next tokens, for ce; `shares`:
    weights of the two parts."""

    def weighted_loss() -> Tensor:
        loss, student, head = compute_kl(model, teacher, rows, fast)
        loss = (1 - ce) * shares[0] * loss
        if ce and labels is not None:
            scores = head(student[:, :-1]).flatten(0, 1)
            loss = loss + ce * shares[1] * F.cross_entropy(
                scores, labels.flatten(), ignore_index=IGNORED
            )
        return loss

    loss = run_in_forward(model, weighted_loss)
    loss.backward()
    return float(loss.detach())


def compute_kl(
    model: PreTrainedModel, teacher: Teacher, rows: Packed, fast: bool
) -> tuple[Tensor, Tensor, nn.Linear]:
    """(KL(teacher || model) per token, the model's last hidden states, its head)."""
    if isinstance(teacher, CachedTeacher):
        student, head = last_hidden(model, rows, fast), model.get_output_embeddings()
        return teacher.compute_kl(student, head, rows, fast), student, head
    with torch.no_grad():
        target = run_in_forward(teacher, lambda: last_hidden(teacher, rows, fast))
    student, head = last_hidden(model, rows, fast), model.get_output_embeddings()
    return head_kl(student, head, target, teacher.get_output_embeddings(), fast), student, head


@torch.no_grad()
def evaluate_kl(model: PreTrainedModel, teacher: Teacher, rows: Packed, batch: int = 16) -> float:
    """KL(teacher || model) per token over all rows."""
    total = 0.0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        total += len(some) * float(compute_kl(model, teacher, some, fast=False)[0])
    return total / len(rows)
