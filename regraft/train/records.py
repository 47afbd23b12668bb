"""The rows a training run writes: metrics.jsonl, the ledger, and the summary of each stage."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Cost(TypedDict):
    """What some work took, over all processes."""

    tokens: int  # tokens of text, or images
    flops: int
    seconds: float


class Throughput(TypedDict):
    """How fast one step was, over all processes."""

    tokens_per_second: float  # images a second for image models
    flops_per_second: float
    peak_share: float  # FLOP/s as a share of the fastest matrix product measured here, 0 to 1


class StepRow(TypedDict):
    """A row of metrics.jsonl for one training step. Costs are totals of the stage up to here.

    Rows of older runs have no speeds.
    """

    stage: int  # from 0
    kind: str  # the stage's objective
    layer: NotRequired[int]  # alignment layer by layer: the layer that is trained
    step: int  # from 1
    tokens: int
    loss: float  # mean over the batch of all processes
    grad_norm: NotRequired[float]  # before clipping
    lr: NotRequired[float]  # the largest of all parameter groups
    seconds: float
    flops: int
    unfrozen: NotRequired[int]  # `learn: lit`: the step after which all weights learn
    tokens_per_second: NotRequired[float]  # see Throughput
    flops_per_second: NotRequired[float]
    peak_share: NotRequired[float]


class LedgerEntry(Cost):
    """What one stage cost."""

    stage: int  # from 0
    kind: str
    precision: str  # float32 or bfloat16
    streamed: NotRequired[bool]  # trained layer by layer, from disk to disk
    flops_per_step: int
    unfrozen: NotRequired[int]  # `learn: lit`: the step after which all weights learn


class StartCost(Cost):
    """What was spent before the first step, such as the closed-form start of the mixers."""

    kind: str


class StageSummary(TypedDict):
    """One stage, or one layer, in a few numbers. Held-out evaluation and saving do not count."""

    stage: int  # from 0; the layer's number for alignment layer by layer
    kind: str
    tokens: int
    steps: int
    first_loss: float  # mean over the first 5 % of the steps
    last_loss: float  # mean over the last 5 % of the steps
    tokens_per_second: float | None  # None when the stage took no measurable time
    peak_share: float | None  # mean over the steps by their seconds; None when none was measured
    seconds: float
