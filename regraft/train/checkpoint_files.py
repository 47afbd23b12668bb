"""The files of a training checkpoint: tensors by PyTorch DCP, all else JSON, and a manifest.

DCP's own `.metadata` is a pickle, which runs code when it is read. Here the same facts are in
metadata.json, and DCP's files of tensors are read with `weights_only=True`. `manifest.json`, which
is written last, has the sha256 of every file. A checkpoint is whole when all of them match.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from .. import distributed
from ..errors import RegraftError
from ..io.files import check_regular_file, read_json, write_json
from ..io.typed import build_dataclass

MANIFEST, METADATA = "manifest.json", "metadata.json"
VERSION = 1
SUFFIX = ".distcp"  # of DCP's files; `__R_N.distcp` is file N of rank R


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        version: of the format.
        files: name -> sha256 of every other file.
    """

    version: int
    files: dict[str, str]


@dataclass(frozen=True)
class StoredChunk:
    """A part of a tensor, and where its bytes are.

    Attributes:
        offset: of its first number in the tensor, by dimension.
        size: its shape.
        file: name of the file.
        start: its first byte there.
        length: its bytes there.
    """

    offset: list[int]
    size: list[int]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: its name in PyTorch, such as `float32`.
        size: its shape.
        chunks: its parts.
    """

    dtype: str
    size: list[int]
    chunks: list[StoredChunk]


@dataclass(frozen=True)
class TensorTable:
    """The content of metadata.json: every tensor by its key."""

    tensors: dict[str, StoredTensor]


class DamagedCheckpointError(RegraftError):
    """A checkpoint is not whole; the message says what is wrong with which file."""


class TensorWriter(dcp.FileSystemWriter):
    """DCP's writer, with metadata.json in place of the pickle."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write where every tensor is; called on the first process once all have written."""
        places = {result.index: result.storage_data for part in results for result in part}
        tensors = {}
        for key, facts in metadata.state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata)  # nothing else is saved
            chunks = []
            for chunk in facts.chunks:
                place = places[MetadataIndex(key, chunk.offsets)]
                chunks.append(
                    StoredChunk(
                        list(chunk.offsets),
                        list(chunk.sizes),
                        place.relative_path,
                        place.offset,
                        place.length,
                    )
                )
            dtype = str(facts.properties.dtype).removeprefix("torch.")
            tensors[key] = StoredTensor(dtype, list(facts.size), chunks)
        write_json(Path(self.path) / METADATA, asdict(TensorTable(tensors)))


class TensorReader(dcp.FileSystemReader):
    """DCP's reader for metadata that was read and checked before."""

    def __init__(self, folder: Path, metadata: Metadata):
        """Prepare to read.

        Args:
            folder: the checkpoint.
            metadata: of its tensors, see `read_metadata`.
        """
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; DCP's own method would unpickle a file."""
        return self.metadata


def write_manifest(folder: Path) -> None:
    """Hash all files of a checkpoint and write manifest.json; all processes call it together.

    Each process hashes the files that it wrote, and the first one all others.
    """
    names = sorted(file.name for file in folder.iterdir())
    own = [name for name in names if name.startswith(f"__{distributed.rank()}_")]
    if distributed.is_rank0():
        own += [name for name in names if not name.endswith(SUFFIX)]
    hashes: dict[str, str] = {}
    for part in distributed.all_gather({name: hash_file(folder / name) for name in own}):
        hashes |= part

    if distributed.is_rank0():
        write_json(folder / MANIFEST, asdict(Manifest(VERSION, dict(sorted(hashes.items())))))


def hash_file(file: Path) -> str:
    """The sha256 of a file as it is on disk now."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(folder: Path) -> None:
    """DamagedCheckpointError, in all processes, unless every file of a checkpoint is as written.

    Each process reads its part of the files.
    """
    manifest = distributed.on_rank0(lambda: read_manifest(folder))
    names = sorted(manifest.files)[distributed.rank() :: distributed.world_size()]
    problem = ""
    for name in names:
        try:
            check_regular_file(folder / name, f"'{name}'")
            if hash_file(folder / name) != manifest.files[name]:
                raise RegraftError(f"'{name}' is not as it was written")
        except (RegraftError, OSError) as error:
            problem = str(error).partition(":")[0]
            break
    if found := next(filter(None, distributed.all_gather(problem)), ""):
        raise DamagedCheckpointError(found)


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a checkpoint; DamagedCheckpointError when it is missing or damaged."""
    try:
        check_regular_file(folder / MANIFEST, f"'{MANIFEST}'")
        manifest: Manifest = build_dataclass(Manifest, read_json(folder / MANIFEST))
    except RegraftError as error:
        raise DamagedCheckpointError(f"{error}".replace(f"'{folder}/", "'")) from error
    if manifest.version != VERSION:
        raise DamagedCheckpointError(f"'{MANIFEST}' has version {manifest.version}, not {VERSION}")
    for name in manifest.files:
        if name != Path(name).name or name in ("", ".", ".."):
            raise DamagedCheckpointError(f"'{MANIFEST}' names '{name:.60}' outside the checkpoint")
    if "state.json" not in manifest.files:
        raise DamagedCheckpointError(f"'{MANIFEST}' does not list state.json")
    return manifest


def read_metadata(folder: Path) -> Metadata | None:
    """What DCP has to know of a checkpoint's tensors; None for a checkpoint without tensors.

    DamagedCheckpointError when metadata.json does not fit the files beside it.
    """
    names = read_manifest(folder).files
    if METADATA not in names:
        return None
    try:
        table: TensorTable = build_dataclass(TensorTable, read_json(folder / METADATA))
    except RegraftError as error:
        raise DamagedCheckpointError(f"'{METADATA}': {error}") from error

    sizes = {name: (folder / name).stat().st_size for name in names if name.endswith(SUFFIX)}
    for key, tensor in table.tensors.items():
        if problem := find_misfit(tensor, sizes):
            raise DamagedCheckpointError(f"'{METADATA}': tensor '{key:.80}' {problem}")
    return to_dcp_metadata(table.tensors)


def find_misfit(tensor: StoredTensor, sizes: Mapping[str, int]) -> str:
    """What is wrong with an entry of metadata.json; empty when nothing is.

    Args:
        tensor: the entry.
        sizes: bytes of each file of tensors.
    """
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return f"has the unknown dtype '{tensor.dtype:.20}'"
    if not is_shape(tensor.size, tensor.size):
        return f"has the shape {tensor.size}"

    covered = 0
    for chunk in tensor.chunks:
        ends = [begin + count for begin, count in zip(chunk.offset, chunk.size, strict=False)]
        if not is_shape(chunk.offset, tensor.size) or not is_shape(chunk.size, tensor.size):
            return f"has a part of shape {chunk.size} at {chunk.offset}"
        if any(end > whole for end, whole in zip(ends, tensor.size, strict=True)):
            return f"has a part that ends at {ends}, beyond {tensor.size}"
        bytes_left = sizes.get(chunk.file, -1) - chunk.start
        if min(chunk.start, chunk.length) < 0 or chunk.length > bytes_left:
            return f"has a part in '{chunk.file:.40}' that is not there"
        if math.prod(chunk.size) * dtype.itemsize > chunk.length:
            return f"has a part of {chunk.size} in {chunk.length} bytes"
        covered += math.prod(chunk.size)
    if covered != math.prod(tensor.size):
        return f"has {covered} numbers, not the {math.prod(tensor.size)} of its shape"
    return ""


def is_shape(size: Collection[int], whole: Collection[int]) -> bool:
    """Whether numbers may be a shape with as many dimensions as another."""
    return len(size) == len(whole) and all(count >= 0 for count in size)


def to_dcp_metadata(tensors: Mapping[str, StoredTensor]) -> Metadata:
    """DCP's own form of metadata.json."""
    facts, places = {}, {}
    for key, tensor in tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offset, size = torch.Size(chunk.offset), torch.Size(chunk.size)
            chunks.append(ChunkStorageMetadata(offset, size))
            places[MetadataIndex(key, offset)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        facts[key] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
    return Metadata(dict(facts), storage_data=places, storage_meta=StorageMeta())
