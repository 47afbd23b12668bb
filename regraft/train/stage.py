"""What a stage of training is: its loss, its budget, its learning rates; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import RegraftError
from .lit import Lit

Kind = Literal["next", "mask", "image"]  # an objective: what a model is scored on
StageKind = Literal["matrix", "align", "distil", "next", "mask", "image"]

LAYERWISE = ("matrix", "align")  # each mixer is matched to its teacher's layer on its own
LAYERS_PATTERN = r"all|bottom:\d+|train:\d+(-\d+)?(,\d+(-\d+)?)*"


@dataclass(frozen=True)
class Stage:
    """One stage of training: what is learned, on how much data, and how fast.

    Dropout is always off. The learning rate rises linearly over `warmup`, stays constant, and
    falls linearly to zero over `cooldown`.

    Attributes:
        kind: the loss.
            `matrix`: each mixer matches the softmax matrices of its teacher's layer.
            `align`: each mixer matches the output of its teacher's layer. Both feed every layer
            the teacher's input and train mixers only.
            `distil`: KL to the teacher's full distribution.
            `next`: next-token cross-entropy.
            `mask`: BERT's masked tokens.
            `image`: the class of an image.
        tokens: the budget in tokens; in images for `image`.
        length: tokens in a row; always 1 for `image`.
        batch: rows in a step, over all processes.
        lr_new: peak learning rate of weights that the source does not have.
        lr_mixer: peak learning rate of inherited weights inside mixers.
        lr_body: peak learning rate of everything else; 0 freezes it. None: 3e-5, or 3e-4 for a
            model without mixers.
        warmup: share of the steps in which the learning rate rises.
        cooldown: share of the steps in which it falls.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        precision: `float32`, `bfloat16` (autocast; a decoder's head stays float32), or `auto`:
            bfloat16 where this machine multiplies it faster.
        mask_share: for `mask`, the share of the tokens to be guessed.
        layer_drop: without mixers only: largest probability that a layer is left out of a step
            (progressive layer dropping, arXiv 2010.13369). LiGO adds 0.1 to its growth.
        token_drop: without mixers only: share of the tokens that skip the middle layers (arXiv
            2203.13240, here drawn at random). LiGO adds 0.15 to its growth.
        layers: without mixers only. `all`; `bottom:N`, the sub-model of the first N layers with
            embeddings and head (bert2BERT's first stage, arXiv 2110.07143); `train:A-B` or
            `train:A,B,..`, counted from 0: all layers run, these and the untied parts of the head
            learn (MSLT, arXiv 2011.13635; LLaMA Pro's new blocks, arXiv 2401.02415).
        ce: for `distil`, the weight of next-token cross-entropy; the KL has the rest.
        rank: with mixers only. Above 0, inherited projections inside mixers learn low-rank
            additions (`train/lora.py`, at `lr_mixer`), new weights learn at `lr_new`, and nothing
            else learns.
        window_drop: with mixers only: probability that a gated layer runs a step without its
            window, so that its state is used (window dropout, arXiv 2510.05901, here per layer
            and step).
        learn: `all`; `new`: whatever was copied from the source stays as it is; `lit`: starts
            like `new` and lets everything learn once the loss hardly falls (XATL, arXiv
            2404.02684).
        lit: when that is, for `learn` `lit`.
    """

    kind: StageKind
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
            object.__setattr__(self, "length", 1)  # the dataclass is frozen
        self._check_batch()
        self._check_layers()
        self._check_mixer_options()
        self._check_budget()

    def _check_batch(self) -> None:
        if min(self.length, self.batch) < 1:
            raise RegraftError(
                f"stage '{self.kind}' has {self.batch} rows of {self.length} a step: give 1 or more"
            )

    def _check_layers(self) -> None:
        if not re.fullmatch(LAYERS_PATTERN, self.layers):
            raise RegraftError(
                f"layers is '{self.layers}': give all, bottom:N, train:A-B or train:A,B,.."
            )
        if not (0 <= self.layer_drop < 1 and 0 <= self.token_drop < 1):
            raise RegraftError(
                f"layer_drop {self.layer_drop}, token_drop {self.token_drop}: "
                "give shares from 0, below 1"
            )

    def _check_mixer_options(self) -> None:
        shares_fit = 0 <= self.ce < 1 and 0 <= self.window_drop < 1
        if not shares_fit or (self.ce and self.kind != "distil"):
            raise RegraftError(
                f"stage '{self.kind}' has ce {self.ce}, window_drop {self.window_drop}: "
                "both are from 0, below 1, and ce is for distil"
            )

        # Low-rank additions already say what learns, and layer-wise stages have no use for them.
        rank_fits = self.learn == "all" and self.kind not in LAYERWISE
        if self.rank < 0 or (self.rank and not rank_fits):
            raise RegraftError(
                f"stage '{self.kind}' has rank {self.rank} and learn '{self.learn}': "
                "a rank is 0 or more, with learn 'all', in stages of the whole model"
            )

    def _check_budget(self) -> None:
        if not 0 < self.mask_share <= 1:
            raise RegraftError(
                f"mask_share is {self.mask_share}: give a share of the tokens above 0, at most 1"
            )
        if self.tokens < self.length * self.batch:
            step = f"{self.batch} x {self.length}"
            raise RegraftError(
                f"stage '{self.kind}' has {self.tokens} {self.unit}, "
                f"less than one step of {step}: give more"
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
        """What held-out rows are scored on."""
        return self.kind if self.kind == "mask" or self.kind == "image" else "next"

    def lr_factor(self, step: int, since: int | None = None) -> float:
        """The learning rate of a step as a share of its peak, in (0, 1].

        Args:
            step: counted from 0.
            since: for weights unfrozen later, the step at which they began to learn. They rise
                from zero to the schedule within `lit.warmup` steps.
        """
        if since is not None and step < (end := min(since + self.lit.warmup, self.steps)):
            return self.lr_factor(end - 1) * (step + 1 - since) / (end - since)

        warm = max(1, round(self.warmup * self.steps))
        cool = max(1, round(self.cooldown * self.steps))
        return min(1.0, (step + 1) / warm, (self.steps - step) / cool)
