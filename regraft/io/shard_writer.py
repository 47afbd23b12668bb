"""Writing: shards tensor by tensor, hashed on the way; directories that appear whole or not at all
and survive a kill.

What is being written lies in a hidden sibling, `.NAME.partial`. A file in it is finished when it
has its own name: it was written as `FILE.part`, flushed to disk, put down in the state file with
its hash, and renamed. A run of the same fingerprint keeps finished files and computes the others; a
partial directory of anything else is emptied first.
"""

from __future__ import annotations

import errno
import fcntl
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RegraftError
from . import safetensors
from .direct_io import DirectWriter
from .files import sync, write_json
from .linux import exchange_paths

if TYPE_CHECKING:
    from ..core.checkpoint import LazyTensor

STATE = ".regraft.json"
NAMES = {dtype: name for name, dtype in safetensors.DTYPES.items()}
# safetensors' own order in a file: wide types first, then by name; tensors stay aligned.
ORDER = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
log = logging.getLogger(__name__)


@dataclass
class PartialDirectory:
    """A directory that is being filled. `done`: the sha256 of every finished file, those of an
    earlier run included.
    """

    path: Path
    fingerprint: Callable[[], str] | None = None
    done: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Keep the files that an earlier run of the same fingerprint finished; remove everything
        else.
        """
        known = self._read_finished(self.fingerprint) if self.fingerprint else {}
        self.done = {name: digest for name, digest in known.items() if (self.path / name).is_file()}
        for path in self.path.iterdir():
            if path.name not in self.done:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.done and self.fingerprint:
            log.info("going on in %s: %d files are finished", self.path, len(self.done))
            self._write_state(self.fingerprint())

    def finish_file(self, name: str, digest: str) -> None:
        """Flush `name`.part to disk, note its hash, and give it its name."""
        sync(self.path / f"{name}.part")
        self.done[name] = digest
        if self.fingerprint:
            self._write_state(self.fingerprint())
        (self.path / f"{name}.part").rename(self.path / name)

    def _read_finished(self, fingerprint: Callable[[], str]) -> dict[str, str]:
        try:
            state = json.loads((self.path / STATE).read_bytes())
            return dict(state["files"]) if state["fingerprint"] == fingerprint() else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _write_state(self, fingerprint: str) -> None:
        write_json(self.path / STATE, {"fingerprint": fingerprint, "files": self.done})


@contextmanager
def new_directory(
    target: Path, overwrite: bool = False, fingerprint: Callable[[], str] | None = None
) -> Iterator[PartialDirectory]:
    """A hidden sibling to fill, which becomes `target` when the block ends well.

    When it does not, everything written is removed and its space given back, except after Ctrl-C
    (or a kill) of a run with a fingerprint: the same call goes on from the files that were
    finished. RegraftError when `target` exists (with `overwrite`: exists and is not a model
    directory), when another run is writing it, or on a full disk.
    """
    target = target.resolve()
    if target.exists() and not overwrite:
        raise RegraftError(f"'{target}' exists: choose another output or pass --overwrite")
    if (
        target.exists()
        and not (target / "config.json").exists()
        and (target.is_file() or any(target.iterdir()))
    ):
        raise RegraftError(
            f"'{target}' exists and is not a model directory, so it is not overwritten: choose"
            " another output"
        )
    try:
        with _claim_directory(target.parent / f".{target.name}.partial") as path:
            partial = PartialDirectory(path, fingerprint)
            try:
                partial.begin()
                yield partial
                _publish(path, target)
            except BaseException as error:
                if isinstance(error, Exception) or not (partial.fingerprint and partial.done):
                    shutil.rmtree(path, ignore_errors=True)
                raise
    except OSError as error:
        raise RegraftError(
            f"cannot write '{target}' ({error}): free some space or choose another output"
        ) from error


@contextmanager
def _claim_directory(path: Path) -> Iterator[Path]:
    """A directory of this name that no other run writes into."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RegraftError(
                f"another run is writing '{path}': wait until it ends or choose another output"
            ) from error
        yield path
    finally:
        os.close(descriptor)


def _publish(path: Path, target: Path) -> None:
    """Flush a directory to disk and give it its name; what had the name before goes."""
    for file in [*path.rglob("*"), path]:
        sync(file)
    (path / STATE).unlink(missing_ok=True)
    if not target.exists():
        path.rename(target)
    elif not exchange_paths(path, target):
        aside = path.with_suffix(".old")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        path.rename(target)
        path = aside
    sync(target.parent)
    shutil.rmtree(path, ignore_errors=True)


def write_weights(partial: PartialDirectory, tensors: Mapping[str, LazyTensor], limit: int) -> None:
    """Write safetensors shards of at most `limit` bytes, or of one tensor; finished ones are left
    as they are.

    Two tensors are in memory at a time: while one is computed, the one before is hashed and written
    past the page cache, and the shard before is flushed to disk.
    """
    groups = safetensors.group_shards({name: lazy.bytes for name, lazy in tensors.items()}, limit)
    files = [shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    left = [
        (file, names) for file, names in zip(files, groups, strict=True) if file not in partial.done
    ]
    check_space(partial.path, sum(tensors[name].bytes for _, names in left for name in names))
    with ThreadPoolExecutor(2) as workers, ThreadPoolExecutor(1) as finisher, _fewer_threads():
        last: Future[None] | None = None
        for file, names in left:
            digest = _write_shard(
                partial.path / f"{file}.part", {name: tensors[name] for name in names}, workers
            )
            if last:
                last.result()
            last = finisher.submit(partial.finish_file, file, digest)
        if last:
            last.result()
    if len(groups) > 1:
        total = sum(lazy.bytes for lazy in tensors.values())
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        write_json(
            partial.path / safetensors.INDEX,
            {"metadata": {"total_size": total}, "weight_map": places},
        )


@contextmanager
def _fewer_threads() -> Iterator[None]:
    """Leave a core to hashing and writing: threads that compute in step wait for the slowest of
    them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, counted from one, as transformers expects it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def check_space(folder: Path, needed: int) -> None:
    """OSError when a disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes to write, {free:,} free"
        )


def file_head(tensors: Mapping[str, LazyTensor]) -> tuple[bytes, list[str]]:
    """The first bytes of a safetensors file, as safetensors itself writes them, and the order of
    the tensors in it.
    """
    order = sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        lazy = tensors[name]
        begin, end = end, end + lazy.bytes
        table[name] = {
            "dtype": NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _write_shard(file: Path, tensors: Mapping[str, LazyTensor], workers: ThreadPoolExecutor) -> str:
    """Write one file; its sha256."""
    head, order = file_head(tensors)
    digest = hashlib.sha256()
    with DirectWriter(file) as stream:
        last = _submit_write(memoryview(head), stream, digest, workers)
        try:
            for name in order:
                data = _read_bytes(name, tensors[name])
                _raise_errors(last)
                last = _submit_write(data, stream, digest, workers)
                del data
        finally:
            wait(last)
        _raise_errors(last)
    return digest.hexdigest()


def _read_bytes(name: str, lazy: LazyTensor) -> memoryview:
    value: Tensor = lazy.read()
    if tuple(value.shape) != tuple(lazy.shape) or value.dtype != lazy.dtype:
        raise RegraftError(
            f"'{name}' came out as {value.dtype} {list(value.shape)}, promised {lazy.dtype}"
            f" {list(lazy.shape)}: report the step that made it"
        )
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _submit_write(
    data: memoryview, stream: DirectWriter, digest: hashlib._Hash, workers: ThreadPoolExecutor
) -> list[Future[None]]:
    return [workers.submit(stream.write, data), workers.submit(digest.update, data)]


def _raise_errors(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()
