"""The output folder of a training run: what may be in it, and that only one run uses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import distributed
from ..core.moments import FILE as MOMENTS_FILE
from ..errors import RegraftError
from ..io import output, shard_writer
from ..io.request import find_difference, plain
from ..progress import print_line
from . import trackers

WORK = Path(output.WORK)  # in the output folder: what only an unfinished run needs
RUN = WORK / "run"  # checkpoints of a training run
TEXT = WORK / "text"  # tokens of its text
TRAINED = WORK / "trained"  # the trained model, until its files are moved into place
# What a training run writes into its output folder beside the model's files.
RUN_NAMES = ("metrics.jsonl", MOMENTS_FILE, trackers.FILE, trackers.FOLDER, "wandb")


@contextmanager
def open_run(
    out: Path,
    kind: str,
    request: Callable[[], Mapping[str, Any]],
    names: tuple[str, ...] = RUN_NAMES,
) -> Iterator[output.Marker]:
    """Inside, the output folder belongs to this run, begun or resumed. Every process calls it.

    Args:
        out: the output folder.
        kind: what to call such a run, for its marker and for messages.
        request: gives everything that decides the result, as values that JSON holds. It may read
            inputs, so it is called once the folder is known to be free, and by one process.
        names: files and folders that the run writes, beside a model's.

    Returns:
        The folder's marker. Where it is complete, the same run has been here before, and what it
        reported is `result`; its work folder is gone.

    RegraftError when the folder holds other files or another run, or a run is going on there.
    """
    with ExitStack() as stack:
        is_new = not out.exists()

        def claim() -> output.Marker:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(output.lock_folder(out))
            output.check_claimable(out)
            asked = plain(request())
            marker = output.claim_folder(out, output.Marker(kind, asked, names=names))
            output.remove_work(out)
            if marker.complete:
                print_line(f"'{out}' is there already, as this command makes it: nothing is run")
            return marker

        marker = distributed.on_rank0(claim)
        try:
            yield marker
        except RegraftError:
            # A wrong input leaves no folder behind that holds nothing.
            if distributed.is_rank0():
                output.release_folder(out, is_new)
            raise


@contextmanager
def open_replacing_run(
    out: Path, overwrite: bool, kind: str, request: Mapping[str, Any]
) -> Iterator[tuple[Path, output.Marker]]:
    """As `open_run`, for a run that may replace a finished output when it is complete.

    Such a run is made in a hidden folder beside the output, which stays until then.

    Args:
        out: the real path of the output.
        overwrite: whether a finished output of regraft may be replaced.
        kind: as in `open_run`.
        request: what is asked for, as values that JSON holds.

    Returns:
        The folder to make the run in, and its marker.

    RegraftError when what is in `out` may not be replaced.
    """
    if not distributed.on_rank0(lambda: _must_replace(out, overwrite, kind, request)):
        with open_run(out, kind, lambda: request) as marker:
            yield out, marker
        return

    beside = distributed.on_rank0(lambda: shard_writer.partial_path(out))
    with shard_writer.claim_partial(beside) if distributed.is_rank0() else nullcontext():
        with open_run(beside, kind, lambda: request) as marker:
            yield beside, marker
            distributed.on_rank0(lambda: output.publish(beside, out, overwrite))


def _must_replace(out: Path, overwrite: bool, kind: str, request: Mapping[str, Any]) -> bool:
    """Whether a finished output has to be replaced; see `open_replacing_run`."""
    marker = output.read_marker(out) if out.exists() else None
    resumes = marker is not None and not marker.complete and marker.kind == kind
    if not overwrite or resumes or not out.exists() or not any(out.iterdir()):
        return False

    # A call that was killed after the exchange has left the old output beside the new one.
    beside = shard_writer.partial_path(out)
    replaced = output.read_marker(beside) if beside.is_dir() else None
    if replaced and replaced.complete and output.is_written(out, request):
        with shard_writer.claim_partial(beside):
            output.remove_output(beside)
        return False
    output.check_replaceable(out, overwrite)
    return True


@contextmanager
def open_scratch(target: Path) -> Iterator[Path]:
    """A folder beside an output, for what is needed until it is written. Every process calls it.

    Args:
        target: the real path of the output.
    """
    scratch = distributed.on_rank0(lambda: shard_writer.claim_scratch(target))
    try:
        yield scratch
    finally:
        if distributed.is_rank0():
            shutil.rmtree(scratch, ignore_errors=True)
            output.release_folder(scratch.parents[1], is_new=True)


def publish_model(folder: Path, out: Path) -> None:
    """Move a model's files from a folder that `Checkpoint.save` wrote into the run's own.

    config.json comes last, so a folder with a config.json is a complete model. RegraftError when
    a file of that name is there that the run did not write.
    """
    written = output.read_marker(folder)
    assert written is not None
    marker = output.read_marker(out) or output.Marker("training", names=RUN_NAMES)
    for name in written.files:
        if (out / name).exists() and name not in {*marker.files, *marker.names}:
            raise RegraftError(
                f"'{out}' holds '{name}', which this run did not write: move it and run the same "
                "command again"
            )

    # Said before it is done: a run that is killed in between finds its own files.
    replace(marker, files={**marker.files, **written.files}).write(out)
    for name in sorted(written.files, key=lambda name: name == "config.json"):
        if (folder / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, out / name)
    shutil.rmtree(folder)


def finish_run(out: Path, result: Any) -> None:
    """Say that a run is complete and what it reports, and remove its work folder."""
    marker = output.read_marker(out)
    assert marker is not None
    hashes = {name: file.sha256 for name, file in marker.files.items()}
    output.complete_marker(out, marker.files, result, hashes)


def check_settings(out: Path, stored: object, settings: Mapping[str, Any], remove: str) -> None:
    """Check that a run in `out` that is about to be resumed has the same settings.

    RegraftError when they differ, or when an input of `settings["inputs"]` is not the same.

    Args:
        out: the output folder.
        stored: the settings as they were read from JSON.
        settings: those of this call.
        remove: what the message says can be removed to start again.
    """
    if difference := find_difference(stored, plain(settings)):
        raise RegraftError(
            f"'{out}' holds a run with other settings, {difference}: give the same ones, another "
            f"output, or remove {remove}"
        )


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Inside, only this run writes checkpoints in `out`; RegraftError when another run does.

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
