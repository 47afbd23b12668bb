"""Model directories written whole or not at all: shards tensor by tensor, resumed after a kill.

A directory NAME is filled as its hidden sibling `.NAME.regraft`. A file in it is written as
`FILE.part`, flushed to disk, recorded in the marker with its hash, and only then renamed to
`FILE`. A run with the same fingerprint keeps the files that are finished and computes the others.
The partial directory of any other run is emptied first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from ..errors import RegraftError
from . import output, safetensors
from .direct_io import DirectWriter
from .files import sync, write_json
from .finite import check_finite
from .request import plain

KIND = "model"  # of the marker of a directory that is written at once
UNFINISHED = "unfinished output"  # of the marker of the folder that it is made in
NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}
# safetensors' own order in a file: wide types first, then by name; tensors stay aligned.
ORDER = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
log = logging.getLogger(__name__)


class WritableTensor(Protocol):
    """A tensor that is computed when it is written, such as `core.lazy.LazyTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value."""

    @property
    def bytes(self) -> int:
        """Size of the value in bytes."""

    @property
    def read(self) -> Callable[[], Tensor]:
        """Computes the value."""


@dataclass(frozen=True)
class ExtraFile:
    """A file that is written with a model, such as the grown state of its optimiser.

    Attributes:
        identity: of what it is made from; values that JSON holds.
        write: writes it to a path.
    """

    identity: Any
    write: Callable[[Path], object]


class TensorRow(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str  # such as "BF16"
    shape: list[int]
    data_offsets: list[int]  # first byte, and the one behind the last, counted behind the header


@dataclass
class PartialDirectory:
    """A directory that is being filled."""

    # The hidden directory.
    path: Path
    # Identifies what is written; None when no later run could resume it.
    fingerprint: Callable[[], str] | None = None
    # What the command was asked for, for the marker.
    request: Any = None
    # Finished file -> sha256, those of an earlier run included.
    done: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Keep what an earlier run with the same fingerprint finished, and remove the rest."""
        marker = _read_own_marker(self.path)
        if marker and self.fingerprint and marker.fingerprint == self.fingerprint():
            # A kill between recording and renaming leaves a recorded file without its name.
            self.done = {
                name: marker.files[name].sha256
                for name in marker.names
                if (self.path / name).is_file()
            }

        for path in self.path.iterdir():
            if path.name not in self.done and path.name != output.MARKER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.done:
            log.info("going on in %s: %d files are finished", self.path, len(self.done))
            self._write_marker()
        else:
            # What it is for is known once the source is hashed, which goes on meanwhile.
            output.Marker(KIND, self.request).write(self.path)

    def finish_file(self, name: str, digest: str) -> None:
        """Flush `name`.part to disk, record its hash, then rename it to `name`."""
        part = self.path / f"{name}.part"
        sync(part)
        self.done[name] = digest
        if self.fingerprint:
            self._write_marker({name: output.WrittenFile.of(part, digest)})
        part.rename(self.path / name)

    def finish(self) -> None:
        """Write the marker that says that everything is there."""
        names = [path.name for path in self.path.iterdir() if path.name != output.MARKER]
        self._write_marker(output.describe_files(self.path, names, self.done), complete=True)

    def _write_marker(
        self, files: Mapping[str, output.WrittenFile] | None = None, complete: bool = False
    ) -> None:
        known = output.describe_files(self.path, self.done, self.done)
        marker = output.Marker(
            KIND,
            self.request,
            self.fingerprint() if self.fingerprint else None,
            complete,
            tuple(self.done),
            known | dict(files or {}),
        )
        marker.write(self.path)


def partial_path(target: Path) -> Path:
    """The hidden directory in which the directory `target`, a real path, is made.

    It lies in the work folder of a folder that is marked as regraft's, beside `target`.
    """
    return output.sibling_path(target, "regraft", UNFINISHED) / output.WORK / target.name


def claim_scratch(target: Path) -> Path:
    """A folder for what a command needs until the directory `target`, a real path, is written."""
    hidden = output.sibling_path(target, "regraft", UNFINISHED)
    output.claim_folder(hidden, output.Marker(UNFINISHED))
    return hidden / output.WORK / "scratch"


@contextmanager
def claim_partial(path: Path) -> Iterator[None]:
    """Inside, no other run makes the hidden directory `path`; what it lies in goes with it."""
    hidden = path.parents[1]
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        with output.lock_folder(hidden):
            output.claim_folder(hidden, output.Marker(UNFINISHED))
            path.mkdir(parents=True, exist_ok=True)
            yield
    finally:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        if hidden.is_dir():
            output.release_folder(hidden, is_new=True)


def _read_own_marker(path: Path) -> output.Marker | None:
    """The marker of a hidden directory, where nobody else writes: a damaged one is none."""
    try:
        return output.read_marker(path) if path.is_dir() else None
    except RegraftError:
        return None


def check_target(out: str | Path, overwrite: bool, request: Any) -> bool:
    """Whether an output is there already as asked for, so that nothing is left to do.

    What a call that was killed at its very end left beside it is removed.

    Args:
        out: the directory that is to be written.
        overwrite: as in `new_directory`.
        request: everything that was asked for, see `output.is_written`.

    RegraftError when `out` may not be written.
    """
    target = output.real_path(out)
    if not overwrite and output.is_written(target, request):
        path = partial_path(target)
        if path.parents[1].is_dir():
            with claim_partial(path):
                _clear_replaced(path, target, None)
        return True
    output.check_replaceable(target, overwrite)
    return False


@contextmanager
def new_directory(
    target: Path,
    overwrite: bool = False,
    fingerprint: Callable[[], str] | None = None,
    request: Any = None,
) -> Iterator[PartialDirectory]:
    """A hidden directory to fill beside `target`, which becomes `target` when the block ends.

    When the block raises, everything written is removed. After Ctrl-C or a kill of a run with a
    fingerprint it stays instead, and the same call resumes from the files that were finished.

    Args:
        target: the directory to write.
        overwrite: whether it may replace an output of regraft that holds nothing else.
        fingerprint: returns a hash of everything that decides what is written.
        request: what the command was asked for, for the marker.

    RegraftError when `target` exists (with `overwrite`: and holds what regraft did not write),
    when another run is writing it, or when the disk is full.
    """
    target = output.real_path(target)
    output.check_replaceable(target, overwrite)

    try:
        path = partial_path(target)
        with claim_partial(path):
            _clear_replaced(path, target, fingerprint)
            path.mkdir(exist_ok=True)
            partial = PartialDirectory(path, fingerprint, plain(request))
            try:
                partial.begin()
                yield partial
                partial.finish()
                output.publish(path, target, overwrite)
            except BaseException as error:
                # Ctrl-C is no `Exception`. After an error the space is given back, since a full
                # disk is the likeliest.
                resumable = not isinstance(error, Exception) and partial.fingerprint
                if not (resumable and partial.done) and path.exists():
                    shutil.rmtree(path, ignore_errors=True)
                raise
    except OSError as error:
        raise RegraftError(
            f"cannot write '{target}' ({error}): free some space or choose another output"
        ) from error


def _clear_replaced(path: Path, target: Path, fingerprint: Callable[[], str] | None) -> None:
    """Remove a complete hidden directory that a killed call left: what `target` was before, or
    what another call made but did not put in place.
    """
    marker = _read_own_marker(path)
    if marker is None or not marker.complete:
        return

    # What this call made before it was killed is kept, unless it was put in place already.
    there = output.read_marker(target)
    own = fingerprint is not None and marker.fingerprint == fingerprint()
    if not own or (there is not None and there.fingerprint == marker.fingerprint):
        output.remove_output(path)


def write_weights(
    partial: PartialDirectory,
    tensors: Mapping[str, WritableTensor],
    limit: int,
    allow_nonfinite: bool = False,
) -> None:
    """Write safetensors shards and, for several, their index; finished shards stay.

    Two tensors are in memory at a time: while one is computed, the one before it is hashed and
    written past the page cache, and the shard before is flushed to disk.

    Args:
        partial: the directory to write into.
        tensors: tensors by their names in the files.
        limit: bytes in a shard; a larger tensor has a shard of its own.
        allow_nonfinite: write NaN and infinity.

    OSError when they do not fit on the disk, RegraftError for a tensor that is not finite.
    """
    groups = safetensors.group_shards({name: lazy.bytes for name, lazy in tensors.items()}, limit)
    files = [shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    shards = list(zip(files, groups, strict=True))
    missing = [(file, names) for file, names in shards if file not in partial.done]
    check_space(partial.path, sum(tensors[name].bytes for _, names in missing for name in names))

    with ThreadPoolExecutor(2) as workers, ThreadPoolExecutor(1) as finisher, _fewer_threads():
        last: Future[None] | None = None
        for file, names in missing:
            part = partial.path / f"{file}.part"
            lazies = {name: tensors[name] for name in names}
            digest = _write_shard(part, lazies, workers, allow_nonfinite)
            # One shard is flushed at a time; an error in flushing ends the run here.
            if last:
                last.result()
            last = finisher.submit(partial.finish_file, file, digest)
        if last:
            last.result()

    if len(groups) > 1:
        total = sum(lazy.bytes for lazy in tensors.values())
        file_of = {name: file for file, names in shards for name in names}
        write_json(
            partial.path / safetensors.INDEX,
            {"metadata": {"total_size": total}, "weight_map": file_of},
        )


@contextmanager
def _fewer_threads() -> Iterator[None]:
    """Compute with one thread less, which leaves a core to hashing and writing.

    Threads of one operation wait for the slowest of them, so sharing a core slows all of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shard_name(number: int, count: int) -> str:
    """The file name that transformers expects of a shard; `number` counts from one."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def check_space(folder: Path, needed: int) -> None:
    """OSError when the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes to write, {free:,} free"
        )


def file_head(tensors: Mapping[str, WritableTensor]) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, byte for byte as the safetensors library writes it.

    Returns:
        The first bytes of the file, and the names in the order in which the tensors follow.
    """
    order = sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))

    rows: dict[str, TensorRow] = {}
    end = 0
    for name in order:
        lazy = tensors[name]
        start, end = end, end + lazy.bytes
        rows[name] = {
            "dtype": NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [start, end],
        }

    table: dict[str, Any] = {"__metadata__": {"format": "pt"}, **rows}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, order


def _write_shard(
    file: Path,
    tensors: Mapping[str, WritableTensor],
    workers: ThreadPoolExecutor,
    allow_nonfinite: bool,
) -> str:
    """Write one file; returns its sha256."""
    head, order = file_head(tensors)
    digest = hashlib.sha256()
    with DirectWriter(file) as stream:
        last = _submit_write(memoryview(head), stream, digest, workers)
        try:
            for name in order:
                # Computed while the workers still write the tensor before.
                data = _read_bytes(name, tensors[name], allow_nonfinite)
                _raise_errors(last)
                last = _submit_write(data, stream, digest, workers)
                del data  # else a third tensor would be in memory while the next is computed
        finally:
            wait(last)  # the workers must not write into a closed file
        _raise_errors(last)
    return digest.hexdigest()


def _read_bytes(name: str, lazy: WritableTensor, allow_nonfinite: bool) -> memoryview:
    """The bytes of a tensor; RegraftError when it is not what its header says, or not finite."""
    value: Tensor = lazy.read()
    if tuple(value.shape) != tuple(lazy.shape) or value.dtype != lazy.dtype:
        raise RegraftError(
            f"'{name}' came out as {value.dtype} {list(value.shape)}, "
            f"promised {lazy.dtype} {list(lazy.shape)}: report the step that made it"
        )
    # A tensor that comes straight from a file was looked at when it was read.
    is_copy = isinstance(getattr(lazy.read, "__self__", None), safetensors.TensorEntry)
    if not (allow_nonfinite or is_copy):
        check_finite(value, f"new tensor '{name}'", "write it all the same with --allow-nonfinite")
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _submit_write(
    data: memoryview, stream: DirectWriter, digest: hashlib._Hash, workers: ThreadPoolExecutor
) -> list[Future[None]]:
    """Write and hash bytes, side by side."""
    return [workers.submit(stream.write, data), workers.submit(digest.update, data)]


def _raise_errors(futures: list[Future[None]]) -> None:
    """Wait for futures; an exception in one of them is raised here."""
    for future in futures:
        future.result()
