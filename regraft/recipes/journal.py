"""Where a run is: finished phases and seconds spent, on disk, so that the same command goes on after a kill."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from ..errors import RegraftError
from ..io.files import read_json_if_exists, write_json, write_text
from ..progress import Ticker

SAVE_EVERY = 2.0


class Journal:
    """`time.json` of a run directory: total `seconds`, and seconds by phase of those that are done."""

    def __init__(self, directory: Path, recipe: str, minutes: float | None):
        self.directory = directory
        self.claim(recipe)
        past = read_json_if_exists(directory / "time.json") or {"seconds": 0.0, "phases": {}}
        self.phases: dict[str, float] = past["phases"]
        self.ticker = Ticker(
            minutes * 60 if minutes else None, past["seconds"], each_beat=self.save_periodically
        )
        self.saved = 0.0
        self.lock = threading.Lock()

    def claim(self, recipe: str) -> None:
        """Write the resolved recipe beside the output; RegraftError when the directory holds something else."""
        file = self.directory / "recipe.yaml"
        if file.exists() and (theirs := file.read_text(encoding="utf-8")) != recipe:
            pairs = zip(theirs.splitlines(), recipe.splitlines(), strict=False)
            line = next(
                (
                    f"'{old.strip()}' there, '{new.strip()}' here"
                    for old, new in pairs
                    if old != new
                ),
                "other keys",
            )
            raise RegraftError(
                f"{self.directory} holds a run of another recipe ({line}): choose another folder or delete it"
            )
        if not file.exists() and self.directory.is_dir() and any(self.directory.iterdir()):
            raise RegraftError(
                f"{self.directory} exists and holds no run: choose another folder or delete it"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(file, recipe)

    def is_done(self, phase: str) -> bool:
        """Whether a phase is finished."""
        return phase in self.phases

    def finish(self, phase: str) -> None:
        """Mark the current phase finished."""
        self.phases[phase] = round(time.monotonic() - self.ticker.phase_begin, 2)
        self.save()

    def save_periodically(self) -> None:
        """Save the time spent now and then; runs in the ticker's thread, where a full disk is not reported."""
        if time.monotonic() - self.saved > SAVE_EVERY and self.directory.exists():
            with contextlib.suppress(OSError):
                self.save()

    def save(self) -> None:
        """Write time.json."""
        with self.lock:
            self.saved = time.monotonic()
            write_json(
                self.directory / "time.json",
                {"seconds": round(self.ticker.seconds_used(), 2), "phases": self.phases},
            )
