"""How a run with a time limit divides its minutes: at least half go to the start and training.

Measurements get fixed shares. What a slower machine cannot measure in its share is left out, and
`TimeShares.notes` says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

CALIBRATION = 0.1  # share of the run's seconds, for the closed-form start
QUALITY = 0.16  # for perplexity and KL before and after training
SPEED = 0.2
SAMPLES = 0.05
MARGIN = 0.03  # for saving, loading and the report
FEWEST_WINDOWS, FEWEST_TOKENS = 2, 16  # that say anything


@dataclass
class TimeShares:
    """The seconds of a run and what they allow to measure.

    Attributes:
        seconds: for the whole run, None for no limit.
        notes: what was measured less than the recipe has it, in words.
    """

    seconds: float | None
    notes: list[str] = field(default_factory=list)

    def share(self, share: float) -> float | None:
        """Seconds of a share, None without a limit."""
        return None if self.seconds is None else share * self.seconds

    def count_windows(self, wanted: int, passes: int, window_seconds: float) -> int:
        """How many windows are measured.

        Args:
            wanted: by the recipe.
            passes: of a model over each window, in the whole run.
            window_seconds: that a model takes for a window.
        """
        if self.seconds is None:
            return wanted
        fits = int(QUALITY * self.seconds / (passes * window_seconds))
        count = min(wanted, max(fits, FEWEST_WINDOWS))
        if count < wanted:
            self.notes.append(f"{count} of {wanted} windows were measured")
        return count

    def count_sample_tokens(self, wanted: int, prompts: int, speeds: Iterable[float]) -> int:
        """How many tokens each model continues a prompt by.

        Args:
            wanted: by the recipe.
            prompts: how many there are.
            speeds: of the models, in tokens per second.
        """
        token_seconds = prompts * sum(1 / speed for speed in speeds)
        if self.seconds is None or not token_seconds:
            return wanted
        fits = int(SAMPLES * self.seconds / token_seconds)
        count = min(wanted, max(fits, FEWEST_TOKENS))
        if count < wanted:
            self.notes.append(f"prompts were continued by {count} instead of {wanted} tokens")
        return count
