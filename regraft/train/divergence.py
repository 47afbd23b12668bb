"""A run that goes astray is stopped: a loss that is no number, or one that jumps and stays up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import RegraftError
from .stage import Stage

MIN_LOSSES = 8  # losses that must be known before one can be too high
Place = tuple[int, int, Path]  # stage, steps of it that are done, where


@dataclass(frozen=True)
class LossSpikeConfig:
    """A loss is too high above `factor` times the median of the stage's last `window` ordinary ones, above the largest
    of these and above the median + `margin` (nats, or relative error). `patience` of them in a row stop the run.

    `factor` 0 looks for no jumps. What is too high does not enter the median. Noise does not do it: the chance that
    ten losses of one distribution in a row are above the largest of the hundred before is below 1e-13; in 367 stages of
    this project's own runs the highest ten in a row stayed below the median + 0.3.
    """

    factor: float = 1.5
    margin: float = 0.5
    window: int = 100
    patience: int = 10

    def __post_init__(self) -> None:
        if (self.factor != 0 and not self.factor > 1) or not math.isfinite(self.factor):
            raise RegraftError(
                f"spike_factor is {self.factor}: give a multiple of the running median above 1, or 0 to never stop"
            )


@dataclass
class LossTrend:
    """What a stage has seen of its loss; the fields are the whole state. `recent`: ordinary losses, at most `window`;
    `high`: how many in a row were too high, up to now; `since`: the step of the first of them.
    """

    recent: list[float] = field(default_factory=list)
    high: int = 0
    since: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether the last loss was too high: such weights are not worth a checkpoint."""
        return self.high > 0

    def observe(self, loss: float, step: int, jump: LossSpikeConfig) -> bool:
        """Take in the loss of one more step, counted from 1; whether it has jumped."""
        if jump.factor == 0:
            return False
        if len(self.recent) >= MIN_LOSSES and loss > self.spike_threshold(jump):
            self.since = self.since if self.high else step
            self.high += 1
            return self.high >= jump.patience
        self.high, self.recent = 0, [*self.recent, loss][-jump.window :]
        return False

    def spike_threshold(self, jump: LossSpikeConfig) -> float:
        """Losses above it are too high."""
        middle = statistics.median(self.recent)
        return max(jump.factor * middle, middle + jump.margin, max(self.recent))


def check_divergence(
    trend: LossTrend, jump: LossSpikeConfig, stage: Stage, place: tuple[int, int], loss: float, norm: float,
    checkpoints: Callable[[], Sequence[Place]],
) -> None:  # fmt: skip
    """RegraftError, with the last good checkpoint, when the loss or the gradient's norm of the step just done is no
    number, or the loss has jumped.

    `place`: (number of the stage, step counted from 1); `checkpoints`: those on disk. A checkpoint is known to be good
    when the loss of the step after it was an ordinary one.
    """
    index, step = place
    if math.isfinite(loss) and math.isfinite(norm):
        if not trend.observe(loss, step, jump):
            return
        usual, first = statistics.median(trend.recent), trend.since
        what = f" is {loss:.4g} at step {step} and has been far above the usual {usual:.4g} since step {first}"
        off = ", or --spike-factor 0 goes on regardless"
    else:
        name, value = ("", loss) if not math.isfinite(loss) else ("'s gradient", norm)
        first, off = trend.since if trend.is_suspect else step, ""
        what = f"{name} is {value} at step {step}"
    good = [known for known in checkpoints() if known[:2] <= (index, first - 2)]
    last = max(good, key=lambda known: known[:2], default=None)
    kept = (
        f"last good checkpoint: {last[2]} (stage {last[0]}, step {last[1]})"
        if last
        else "no good checkpoint yet"
    )
    raise RegraftError(
        f"loss of stage '{stage.kind}'{what}; {kept}: lower its learning rates and run again{off}"
    )
