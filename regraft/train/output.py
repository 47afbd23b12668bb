"""The output folder of a training run: whether a run may use it, and that only one does."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import distributed
from ..errors import RegraftError
from ..io.identity import find_changed_input
from . import trackers

RUN = "run"  # folder for what a run needs to be resumed
TEXT = "run.text"  # folder for the tokens of its text, until the run ends
# What a run may have left in its output folder before it has written a checkpoint.
RUN_FILES = {"metrics.jsonl", TEXT, trackers.FILE, trackers.FOLDER, "wandb"}


def check_output(out: Path, folder: str, own: Collection[str], kind: str = "run") -> None:
    """Check that `out` is new, empty, or the folder of a run that can be resumed.

    RegraftError when it holds a finished model or files of something else.

    Args:
        out: the output folder.
        folder: name of the folder inside it that every started run of this kind has.
        own: names of what a run may leave in `out` before it has made that folder.
        kind: what to call such a run in the error message.
    """
    names = {file.name for file in out.iterdir()} if out.exists() else set()
    if "config.json" in names:
        raise RegraftError(
            f"{out} holds a finished model: choose another folder, or delete it to train again"
        )

    # A run that was killed before its first checkpoint has left some of its files, but no folder.
    foreign = names - set(own)
    if foreign and folder not in names:
        raise RegraftError(
            f"{out} holds '{min(foreign)}' and no {kind}: choose another folder or delete it"
        )


def check_settings(out: Path, stored: object, settings: Mapping[str, Any], remove: str) -> None:
    """Check that a run in `out` that is about to be resumed has the same settings.

    RegraftError when they differ, or when an input of `settings["inputs"]` is not the same.

    Args:
        out: the output folder.
        stored: the settings as they were read from JSON.
        settings: those of this call.
        remove: what the message says can be removed to start again.
    """
    # `stored` has been through JSON, which turns tuples into lists.
    before = dict(stored) if isinstance(stored, Mapping) else {}
    now = json.loads(json.dumps(settings))
    inputs, inputs_now = before.pop("inputs", {}), now.pop("inputs", {})

    changed = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
    if changed is not None:
        raise RegraftError(
            f"'{out}' holds a run with other settings ({changed}): give another output, or remove "
            f"{remove}"
        )
    if isinstance(inputs, Mapping) and set(inputs) != set(inputs_now):
        raise RegraftError(
            f"'{out}' holds a run with other inputs ({', '.join(inputs) or 'none recorded'}, now "
            f"{', '.join(inputs_now)}): give the same ones or another output, or remove {remove}"
        )
    if change := find_changed_input(inputs, inputs_now):
        raise RegraftError(
            f"'{out}' holds a run that began with another input ({change}): give the same input or "
            f"another output, or remove {remove}"
        )


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Inside, only this run writes in `out`; RegraftError when another run does.

    The operating system releases the lock when the process dies, so a killed run leaves none.
    """
    lock = FileLock(out / RUN / "lock")

    def acquire_lock() -> None:
        (out / RUN).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)

    try:
        distributed.on_rank0(acquire_lock)
    except Timeout as error:
        raise RegraftError(
            f"another run is going on in '{out}': wait for it, or stop all of its processes"
        ) from error

    try:
        yield
    finally:
        lock.release()
