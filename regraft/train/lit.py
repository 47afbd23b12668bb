"""When frozen weights begin to learn: the loss-improvement threshold (LIT) of XATL (arXiv 2404.02684), online."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RegraftError


@dataclass(frozen=True)
class Lit:
    """After each `window` of steps its mean training loss L_k is compared with the last window's: it is a hit when
    (L_{k-1} - L_k) / L_{k-1} < `tau`.

    Everything learns after `patience` hits, consecutive or not, none of them before `min_steps`, and at `max_steps` in
    any case (None: perhaps never). What then begins to learn reaches the schedule's rate in `warmup` steps. The paper
    has windows of 5,000 steps and 2,000 steps of warm-up.
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
    """What has been seen of the training loss; its fields are its whole state.

    `steps`: losses seen; `total`: their sum in this window; `before`: the mean of the last one; `hits` so far;
    `unfrozen`: the step after which everything learns, None while it does not.
    """

    steps: int = 0
    total: float = 0.0
    before: float | None = None
    hits: int = 0
    unfrozen: int | None = None

    def observe(self, loss: float, lit: Lit) -> bool:
        """Take in the loss of one more step; whether everything learns from here on. True once."""
        if self.unfrozen is not None:
            return False
        self.steps, self.total = self.steps + 1, self.total + loss
        if self.steps % lit.window == 0:
            mean = self.total / lit.window
            small = self.before is not None and self.before - mean < lit.tau * self.before
            self.hits += small and self.steps >= lit.min_steps
            self.total, self.before = 0.0, mean
        if self.hits >= lit.patience or self.steps == lit.max_steps:
            self.unfrozen = self.steps
        return self.unfrozen is not None
