"""Rows of metrics.jsonl sent to trackio, wandb or TensorBoard while a run goes on, its resumption included."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import RegraftError
from ..io.files import read_json_if_exists, read_json_lines, write_json

PROJECT = "regraft"
FILE, FOLDER = "track.json", "tensorboard"  # what is left in a run's directory
Row = dict[str, Any]


class Trackio:
    """trackio's own place on disk (`trackio show`); a run of the same name goes on."""

    package = "trackio"

    def __init__(self, module: Any, name: str, out: Path, facts: Row):
        self.module = module
        module.init(project=PROJECT, name=name, config=facts, resume="allow")

    def log(self, values: Row, step: int) -> None:
        """One row."""
        self.module.log(values, step=step)

    def close(self, failed: bool) -> None:
        """Send what is waiting."""
        self.module.finish()


class Wandb:
    """Weights & Biases, into the run's directory without a network (`wandb sync`) unless WANDB_MODE says otherwise."""

    package = "wandb"

    def __init__(self, module: Any, name: str, out: Path, facts: Row):
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = module.init(
            project=PROJECT, id=name, name=name, dir=str(out), config=facts, resume="allow"
        )

    def log(self, values: Row, step: int) -> None:
        """One row."""
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """Mark the run as done or as stopped."""
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in the run's own `tensorboard` folder."""

    package = "tensorboard"

    def __init__(self, module: Any, name: str, out: Path, facts: Row):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / FOLDER))

    def log(self, values: Row, step: int) -> None:
        """One row; words are left out."""
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        """Write what is waiting."""
        self.writer.close()


TRACKERS: dict[str, Callable[[Any, str, Path, Row], Any]] = {
    "trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard,
}  # fmt: skip


def import_trackers(names: str | None) -> dict[str, Any]:
    """Trackers' libraries by name, of a list such as `wandb,tensorboard`; nothing of theirs is begun.

    RegraftError for an unknown name or a library that is not installed.
    """
    asked = [name.strip() for name in (names or "").split(",") if name.strip()]
    found: dict[str, Any] = {}
    for name in asked:
        if name not in TRACKERS:
            raise RegraftError(
                f"no tracker is called '{name}': give {', '.join(TRACKERS)}, or a list of them"
            )
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            raise RegraftError(
                f"--track {name} needs its library ({error}): pip install {name}"
            ) from error
    return found


@contextmanager
def open_trackers(names: str | None, out: Path, facts: Row) -> Iterator[Callable[[Row], None]]:
    """Inside, what takes the rows of `out/metrics.jsonl` as they are written and hands them to the trackers.

    Only the first process of a torchrun does. The run's name is kept in `out/track.json`, so that the same command
    goes on with the same run; rows that an interrupted run has sent are not sent again. A tracker that fails while the
    run goes on says so once and gets no more rows. RegraftError as in `chosen`.
    """
    modules = import_trackers(names)
    if not modules or not distributed.is_rank0():
        yield lambda row: None
        return
    out.mkdir(parents=True, exist_ok=True)
    known = read_json_if_exists(out / FILE) or {
        "name": f"{out.resolve().name}-{secrets.token_hex(4)}"
    }
    write_json(out / FILE, known)
    sender = Sender(read_json_lines(out / "metrics.jsonl"))
    for name, module in modules.items():
        with sender.isolate_failure(name):
            sender.trackers[name] = TRACKERS[name](module, known["name"], out, facts)
    failed = True
    try:
        yield sender
        failed = False
    finally:
        for name, tracker in list(sender.trackers.items()):
            with sender.isolate_failure(name):
                tracker.close(failed)


class Sender:
    """Hands rows to trackers, by the number of the step counted over all stages; `past`: rows that were sent before."""

    def __init__(self, past: list[Row]):
        self.trackers: dict[str, Any] = {}
        self.steps: dict[int, int] = {}
        self.sent = {self.row_key(row) for row in past}
        for row in past:
            self.global_step(row)

    @staticmethod
    def row_key(row: Row) -> tuple[int, int, bool]:
        """What tells rows apart: the stage, the step, and whether it is about held-out rows."""
        return row.get("stage", 0), row.get("step", 0), "loss" in row

    def global_step(self, row: Row) -> int:
        """The step counted over all stages."""
        stage, step, _ = self.row_key(row)
        self.steps[stage] = max(step, self.steps.get(stage, 0))
        return step + sum(done for index, done in self.steps.items() if index < stage)

    def __call__(self, row: Row) -> None:
        """One more row."""
        step = self.global_step(row)
        if self.row_key(row) in self.sent:
            return
        values = {key: value for key, value in row.items() if key != "step"}
        for name, tracker in list(self.trackers.items()):
            with self.isolate_failure(name):
                tracker.log(values, step)

    @contextmanager
    def isolate_failure(self, name: str) -> Iterator[None]:
        """A tracker's failure is said and ends the tracker, not the run."""
        try:
            yield
        except Exception as error:
            self.trackers.pop(name, None)
            words = " ".join(str(error).split())
            print(
                f"regraft: {name} failed ({words}) and gets no more rows; metrics.jsonl has all",
                file=sys.stderr,
            )
