"""How far a run is, on disk: finished phases and time spent, to resume it after a kill."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import NotRequired, TypedDict

from ..io.files import read_json_if_exists, write_json, write_text
from ..progress import Ticker

SAVE_EVERY = 2.0  # seconds


class RunTime(TypedDict):
    """The contents of `time.json`."""

    seconds: float  # of the whole run so far, restarts included
    phases: dict[str, float]  # seconds of each finished phase, by name
    notes: NotRequired[list[str]]  # what the time limit left out, in words


class Journal:
    """`time.json` and `recipe.yaml` of a run directory.

    Args:
        directory: of the run; see `train.output.open_run`.
        recipe: the resolved recipe as YAML.
        minutes: time for the whole run, None for no limit.
    """

    def __init__(self, directory: Path, recipe: str, minutes: float | None):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "recipe.yaml", recipe)
        past: RunTime | None = read_json_if_exists(directory / "time.json", RunTime)
        past = past or {"seconds": 0.0, "phases": {}}
        self.phases: dict[str, float] = past["phases"]
        self.notes: list[str] = past.get("notes", [])
        self.ticker = Ticker(
            minutes * 60 if minutes else None, past["seconds"], each_beat=self.save_periodically
        )
        self.saved = 0.0
        self.lock = threading.Lock()

    def is_done(self, phase: str) -> bool:
        """Whether a phase is finished."""
        return phase in self.phases

    def finish(self, phase: str) -> None:
        """Mark the current phase as finished."""
        self.phases[phase] = round(time.monotonic() - self.ticker.phase_begin, 2)
        self.save()

    def save_periodically(self) -> None:
        """Save the time spent, every two seconds; called by the ticker's thread.

        A full disk is not reported here: the phase that is running will find it.
        """
        if time.monotonic() - self.saved > SAVE_EVERY and self.directory.exists():
            with contextlib.suppress(OSError):
                self.save()

    def save(self) -> None:
        """Write time.json."""
        with self.lock:
            self.saved = time.monotonic()
            spent: RunTime = {
                "seconds": round(self.ticker.seconds_used(), 2),
                "phases": self.phases,
                "notes": list(dict.fromkeys(self.notes)),
            }
            write_json(self.directory / "time.json", spent)
