"""What a comparison writes: done.json of every run, compare.json with the numbers of all arms."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, Required, TypedDict

AxisName = Literal["tokens", "flops", "seconds"]
AXES: tuple[AxisName, ...] = ("tokens", "flops", "seconds")

MeasureName = Literal[
    "start_loss", "loss", "accuracy", "kl", "unfrozen", "tokens", "flops", "seconds"
]
MEASURES: tuple[MeasureName, ...] = ("start_loss", "loss", "accuracy", "kl", "unfrozen", *AXES)

Savings = dict[str, float | None]
"""What an arm saves until it reaches scratch's final loss; None where it never does.

For AXIS in `AXES`:

- `AXIS_to_reach`: what it takes until then.
- `times_AXIS`: how many times less than scratch that is; None where it starts there.
- `saved_AXIS`, `saved_AXIS_share`: the difference to scratch, and as a share of scratch's total.
- `saved_AXIS_with_source`, `saved_AXIS_share_with_source`: the same less the source's pretraining.
"""


class AverageCost(TypedDict):
    """What training, or making a start, took: of one run, or the mean over the seeds."""

    # Floating-point operations; a multiply-add is 2.
    flops: float
    # Time of the training steps alone; evaluations do not count.
    seconds: float
    # Tokens, or images.
    tokens: float


NO_COST: AverageCost = {"flops": 0, "seconds": 0.0, "tokens": 0}


class ArmStartCost(AverageCost):
    """What it took to make an arm's model before it is trained."""

    # Layers that keep softmax attention, of a linearized arm.
    keep: NotRequired[str | None]
    # Of a fitted map: its steps, and the FLOPs of making weights as a share of a plain step's.
    steps: NotRequired[int]
    overhead: NotRequired[float]


class StageCost(AverageCost):
    """What one stage of training took."""

    # Step after which everything learned, where a stage of `lit` got that far.
    unfrozen: NotRequired[int]


class Ledger(AverageCost):
    """The ledger of a training run: its totals and its stages."""

    stages: list[StageCost]


class HeldOut(TypedDict):
    """A model on the held-out rows."""

    loss: float
    # Share of right first guesses.
    accuracy: float


class DoneLeg(TypedDict):
    """What is read of a leg of an arm."""

    layers: str


class DoneArm(TypedDict):
    """What is read of the recipe's `Arm`; the rest is compared with the recipe."""

    legs: list[DoneLeg]


class DoneFacts(TypedDict, total=False):
    """done.json: the last thing that a run of a source or an arm writes."""

    seed: Required[int]
    ledger: Required[Ledger]
    # Of a source: its config, as the recipe has it.
    config: dict[str, Any]
    # Of an arm: the recipe's `Arm`, its parameters, what its start took.
    arm: DoneArm
    parameters: int
    start: ArmStartCost
    # Of an arm with legs: the whole model before training.
    whole: HeldOut | None


class CurveNumbers(TypedDict):
    """A `Curve` as lists; one number for every evaluation."""

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    accuracy: list[float]
    kl: list[float]


class MeanStd(TypedDict):
    """Mean and spread over seeds of what was measured."""

    # None where nothing was measured.
    mean: float | None
    # Of a sample; 0 for one value.
    std: float | None
    count: int


class SeedNumbers(TypedDict):
    """One run of an arm; the keys of `Savings` follow where scratch has a run of the same seed."""

    start_loss: float
    loss: float
    accuracy: float
    fitting: ArmStartCost
    flops: float
    seconds: float
    tokens: float
    # To the teacher at the end, in nats; None without a teacher.
    kl: float | None
    curve: CurveNumbers
    unfrozen: int | None


class ArmMeasures(TypedDict):
    """What an arm's runs gave: means over seeds, and every seed."""

    parameters: int
    # The mean over seeds.
    curve: CurveNumbers
    # By seed as text.
    seeds: dict[str, SeedNumbers]
    start_loss: MeanStd
    loss: MeanStd
    accuracy: MeanStd
    kl: MeanStd
    unfrozen: MeanStd
    tokens: MeanStd
    flops: MeanStd
    seconds: MeanStd
    # Of the mean curve, and over seeds; not there when scratch shares no seed with the arm.
    savings: NotRequired[Savings]
    savings_over_seeds: NotRequired[dict[str, MeanStd]]


class ArmNumbers(ArmMeasures):
    """An arm in compare.json."""

    # The source that it grows; None for scratch.
    source: str | None
    # Whether it is a linearized model.
    linear: bool
    # The scratch arm that it is measured against; None for scratch.
    against: str | None


class SourceSeed(AverageCost):
    """What pretraining a source took, and its last held-out loss."""

    loss: float


class SourceNumbers(TypedDict):
    """A source in compare.json; `seeds` is empty for a model that was given."""

    pretrained_here: bool
    seeds: dict[int, SourceSeed]


class FailedRun(TypedDict):
    """A run that ended with an error."""

    # `source` or `arm`.
    kind: str
    name: str
    seed: int
    # One line.
    error: str


class ComparisonNumbers(TypedDict):
    """compare.json."""

    task: str
    seeds: list[int]
    # By name; an arm without a finished run is not there.
    arms: dict[str, ArmNumbers]
    # Tokens (or images) of one training step.
    step: int
    sources: dict[str, SourceNumbers]
    failed: list[FailedRun]
