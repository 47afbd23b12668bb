"""How far a run is, on disk: finished phases and time spent, to resume it after a kill."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, TypedDict

import yaml

from ..errors import RegraftError
from ..io.files import read_json_if_exists, write_json, write_text
from ..progress import Ticker

SAVE_EVERY = 2.0  # seconds


class RunTime(TypedDict):
    """The contents of `time.json`."""

    seconds: float  # of the whole run so far, restarts included
    phases: dict[str, float]  # seconds of each finished phase, by name


class Journal:
    """`time.json` and `recipe.yaml` of a run directory.

    Args:
        directory: of the run; made when it is missing.
        recipe: the resolved recipe as YAML.
        minutes: time for the whole run, None for no limit.

    RegraftError when the directory holds another run, or something else.
    """

    def __init__(self, directory: Path, recipe: str, minutes: float | None):
        self.directory = directory
        self.claim(recipe)
        past: RunTime | None = read_json_if_exists(directory / "time.json")
        past = past or {"seconds": 0.0, "phases": {}}
        self.phases: dict[str, float] = past["phases"]
        self.ticker = Ticker(
            minutes * 60 if minutes else None, past["seconds"], each_beat=self.save_periodically
        )
        self.saved = 0.0
        self.lock = threading.Lock()

    def claim(self, recipe: str) -> None:
        """Write the resolved recipe beside the output.

        RegraftError when the directory holds a run of another recipe, or something else.
        """
        file = self.directory / "recipe.yaml"
        if file.exists():
            before, now = (
                _without_paths(text) for text in (file.read_text(encoding="utf-8"), recipe)
            )
            if before != now:
                raise RegraftError(
                    f"{self.directory} holds a run of another recipe "
                    f"({_describe_difference(before, now)}): choose another folder or delete it"
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
            }
            write_json(self.directory / "time.json", spent)


def _without_paths(recipe: str) -> str:
    """A recipe without the paths of its inputs, which may be moved: their content is compared."""
    try:
        fields: dict[str, Any] = yaml.safe_load(recipe)
        measure = fields["measure"]
        del fields["source"]
        for text in fields["train"]:
            del text["path"]
        for part, key in ((fields, "heldout"), (measure, "task_data")):
            part[key] = part[key] is not None
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, KeyError, TypeError):
        return recipe  # damaged, or of another version: other words are another recipe


def _describe_difference(before: str, now: str) -> str:
    """The first line that differs between two recipes."""
    for old, new in zip(before.splitlines(), now.splitlines(), strict=False):
        if old != new:
            return f"'{old.strip()}' there, '{new.strip()}' here"
    return "other keys"
