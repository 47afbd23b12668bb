"""When frozen weights begin to learn: XATL's loss-improvement threshold, measured online."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RegraftError


@dataclass(frozen=True)
class Lit:
    """The loss-improvement threshold (LIT) of XATL (arXiv 2404.02684).

    The training loss is averaged over windows of steps. A window is a hit when its mean L_k has
    hardly improved on the one before: (L_{k-1} - L_k) / L_{k-1} < `tau`. All weights learn after
    `patience` hits, consecutive or not. The paper has windows of 5,000 steps and 2,000 steps of
    warm-up.

    Attributes:
        window: steps whose losses are averaged.
        tau: relative improvement below which a window is a hit.
        patience: hits after which all weights learn.
        min_steps: windows that end before this step are no hits.
        max_steps: step at which all weights learn in any case; None: perhaps never.
        warmup: steps in which the newly learning weights reach the schedule's rate.
    """

    window: int = 100
    tau: float = 0.01
    patience: int = 1
    min_steps: int = 0
    max_steps: int | None = None
    warmup: int = 40

    def __post_init__(self) -> None:
        if min(self.window, self.patience, self.warmup) < 1:
            raise RegraftError(f"{self}: window, patience and warmup are 1 or more")
        if self.max_steps is not None and self.max_steps < max(1, self.min_steps):
            raise RegraftError(f"{self}: max_steps is at least 1 and min_steps")


@dataclass
class LitState:
    """What has been seen of the training loss. The fields are the whole state, saved as JSON.

    Attributes:
        steps: losses seen.
        total: sum of the losses in the current window.
        before: mean loss of the last window, None in the first.
        hits: windows that hardly improved.
        unfrozen: the step after which all weights learn, None before.
    """

    steps: int = 0
    total: float = 0.0
    before: float | None = None
    hits: int = 0
    unfrozen: int | None = None

    def observe(self, loss: float, lit: Lit) -> bool:
        """Take in the loss of one more step; whether all weights learn from here on.

        True once, at the step that decides it.
        """
        if self.unfrozen is not None:
            return False

        self.steps, self.total = self.steps + 1, self.total + loss
        if self.steps % lit.window == 0:
            mean = self.total / lit.window
            # The paper's quotient multiplied out, so that a loss of 0 divides nothing.
            hit = self.before is not None and self.before - mean < lit.tau * self.before
            self.hits += hit and self.steps >= lit.min_steps
            self.total, self.before = 0.0, mean

        if self.hits >= lit.patience or self.steps == lit.max_steps:
            self.unfrozen = self.steps
        return self.unfrozen is not None
