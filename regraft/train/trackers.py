"""Send the rows of metrics.jsonl to trackio, wandb or TensorBoard, also when a run is resumed."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypedDict

from .. import distributed
from ..errors import RegraftError
from ..io.files import read_json_if_exists, read_json_lines, write_json
from ..progress import print_line
from .metrics import FILE as METRICS
from .metrics import MetricsRow

PROJECT = "regraft"
FILE, FOLDER = "track.json", "tensorboard"  # what trackers leave in a run's folder
Row = Mapping[str, Any]  # a row of metrics.jsonl, whatever it has


class TrackedRun(TypedDict):
    """The contents of `track.json`."""

    name: str  # of the run in all trackers


class Tracker(Protocol):
    """One tracking library. Its class is called with (module, name of the run, folder, facts)."""

    def log(self, values: Row, step: int) -> None:
        """Send one row."""

    def close(self, failed: bool) -> None:
        """Send what is waiting and end the run."""


class Trackio:
    """trackio, in its own folder on disk (`trackio show`); a run of the same name is resumed."""

    def __init__(self, module: Any, name: str, out: Path, facts: dict[str, Any]):
        self.module = module
        module.init(project=PROJECT, name=name, config=facts, resume="allow")

    def log(self, values: Row, step: int) -> None:
        """Send one row."""
        self.module.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Send what is waiting."""
        self.module.finish()


class Wandb:
    """Weights & Biases, offline in the run's folder unless WANDB_MODE says otherwise.

    `wandb sync` uploads an offline run.
    """

    def __init__(self, module: Any, name: str, out: Path, facts: dict[str, Any]):
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = module.init(
            project=PROJECT, id=name, name=name, dir=str(out), config=facts, resume="allow"
        )

    def log(self, values: Row, step: int) -> None:
        """Send one row."""
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Mark the run as done or as stopped."""
        self.run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in the run's own `tensorboard` folder."""

    def __init__(self, module: Any, name: str, out: Path, facts: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / FOLDER))

    def log(self, values: Row, step: int) -> None:
        """Send the numbers of one row."""
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        """Write what is waiting."""
        self.writer.close()


TRACKERS: dict[str, Callable[[Any, str, Path, dict[str, Any]], Tracker]] = {
    "trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard,
}  # fmt: skip


def import_trackers(names: str | None) -> dict[str, ModuleType]:
    """Import tracking libraries without starting a run.

    RegraftError for an unknown name or a library that is not installed.

    Args:
        names: a list such as `wandb,tensorboard`, or None.
    """
    modules: dict[str, ModuleType] = {}
    for name in [word.strip() for word in (names or "").split(",") if word.strip()]:
        if name not in TRACKERS:
            raise RegraftError(
                f"no tracker is called '{name}': give {', '.join(TRACKERS)}, or a list of them"
            )

        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            raise RegraftError(
                f"--track {name} needs its library ({error}): pip install {name}"
            ) from error
    return modules


@contextmanager
def open_trackers(
    names: str | None, out: Path, facts: dict[str, Any]
) -> Iterator[Callable[[Row], None]]:
    """Inside, a function that sends rows of `out/metrics.jsonl` to the trackers.

    Only the first process of a torchrun sends. The run's name is stored in `out/track.json`, so
    that a resumed run continues in the tracker; rows sent before are not sent again. A tracker
    that fails is reported once and gets no more rows, while training continues.

    RegraftError as in `import_trackers`.

    Args:
        names: a list such as `wandb,tensorboard`, or None.
        out: the run's output folder.
        facts: what the trackers store as the run's configuration.
    """
    modules = import_trackers(names)
    if not modules or not distributed.is_rank0():
        yield lambda row: None
        return

    out.mkdir(parents=True, exist_ok=True)
    # The random part keeps apart runs whose folders have the same name.
    known = read_json_if_exists(out / FILE, TrackedRun) or {
        "name": f"{out.resolve().name}-{secrets.token_hex(4)}"
    }
    write_json(out / FILE, known)

    sender = Sender(read_json_lines(out / METRICS, MetricsRow))
    for name, module in modules.items():
        with sender.isolate_failure(name):
            sender.trackers[name] = TRACKERS[name](module, known["name"], out, facts)

    failed = True
    try:
        yield sender
        failed = False
    finally:
        # A copy of the list: a tracker that fails to close is removed from the sender.
        for name, tracker in list(sender.trackers.items()):
            with sender.isolate_failure(name):
                tracker.close(failed)


class Sender:
    """Sends rows to trackers, numbered by steps over all stages."""

    def __init__(self, past: Sequence[Row]):
        """Start with the rows that were sent before the run was interrupted."""
        self.trackers: dict[str, Tracker] = {}
        self.steps: dict[int, int] = {}  # for each stage its last step so far
        self.sent = {self.row_key(row) for row in past}
        for row in past:
            self.global_step(row)

    @staticmethod
    def row_key(row: Row) -> tuple[int, int, bool]:
        """What distinguishes rows: stage, step, and whether it is a training step's."""
        return row.get("stage", 0), row.get("step", 0), "loss" in row

    def global_step(self, row: Row) -> int:
        """The row's step counted over all stages. Trackers need numbers that never fall."""
        stage, step, _ = self.row_key(row)
        self.steps[stage] = max(step, self.steps.get(stage, 0))
        return step + sum(done for index, done in self.steps.items() if index < stage)

    def __call__(self, row: Row) -> None:
        """Send one row."""
        step = self.global_step(row)
        if self.row_key(row) in self.sent:
            return
        values = {key: value for key, value in row.items() if key != "step"}
        for name, tracker in list(self.trackers.items()):
            with self.isolate_failure(name):
                tracker.log(values, step)

    @contextmanager
    def isolate_failure(self, name: str) -> Iterator[None]:
        """Inside, a tracker's failure is reported and ends the tracker, not the run."""
        try:
            yield
        except Exception as error:  # libraries with networks behind them may raise anything
            self.trackers.pop(name, None)
            message = " ".join(str(error).split())
            print_line(f"{name} failed ({message}) and gets no more rows; metrics.jsonl has all")
