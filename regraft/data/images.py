"""Labelled images in memory, and how they are read from a .npz file."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import RegraftError, explain_errors
from ..io.linux import free_memory
from ..io.schema import shorten
from .rows import hash_tensors

# Of images that are compressed: bytes that are always read, and of the bytes in memory to those on
# disk otherwise. Pictures have 1 to 5.
MAX_PACKED_BYTES, MAX_RATIO = 256_000_000, 200


@dataclass(frozen=True)
class Images:
    """Labelled images, normalised as the model takes them.

    Attributes:
        pixel_values: (images, channels, height, width), float32.
        labels: (images,), int64.
    """

    pixel_values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixel_values[rows], self.labels[rows])

    @property
    def tokens(self) -> int:
        """How many images there are: what a stage's budget counts."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """The device that holds them."""
        return self.pixel_values.device

    @cached_property
    def digest(self) -> str:
        """A hash of all images and labels."""
        return hash_tensors(self.pixel_values, self.labels)

    def to(self, device: torch.device) -> Images:
        """The same images on a device."""
        return Images(self.pixel_values.to(device), self.labels.to(device))


def read_images(path: str | Path) -> Images:
    """Read a .npz file with two arrays, `pixel_values` and `labels`.

    Args:
        path: the file. `pixel_values` are floats of shape (images, channels, height, width),
            normalised as the model's image processor does it; `labels` are whole numbers of
            shape (images,).

    RegraftError for a missing file, one that is not .npz, a missing array, a wrong shape or dtype.
    """
    arrays = _load_arrays(path)
    pixels, labels = arrays["pixel_values"], arrays["labels"]

    # kind "f": floats; "iu": signed and unsigned whole numbers
    if pixels.ndim != 4 or pixels.dtype.kind != "f":
        raise RegraftError(
            f"pixel_values in '{path}' are {pixels.dtype} {list(pixels.shape)}: they must be "
            "floats (n, channels, height, width), normalised as the model's image processor does it"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise RegraftError(
            f"labels in '{path}' are {labels.dtype} {list(labels.shape)}: they must be one whole "
            f"number for each of the {len(pixels)} images"
        )

    return Images(
        torch.from_numpy(pixels.astype("float32")), torch.from_numpy(labels.astype("int64"))
    )


def _load_arrays(path: str | Path) -> dict[str, numpy.ndarray]:
    """The two arrays of a .npz file; RegraftError where one is missing or the file is damaged."""
    if Path(path).suffix != ".npz":
        raise RegraftError(
            f"cannot read '{path}' as images: give a .npz file with pixel_values and labels"
        )
    if not Path(path).is_file():
        raise RegraftError(f"no images at '{path}': give a .npz file with pixel_values and labels")

    names = ("pixel_values", "labels")
    what, remedy = f"'{path}' is no readable .npz file", "save it again with numpy.savez"
    with explain_errors(what, remedy):
        with zipfile.ZipFile(path) as archive:
            for name in set(archive.namelist()) & {f"{name}.npy" for name in names}:
                _check_array(archive, name, str(path))
        # without pickle: a pickled array could run code
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names if name in file.files}

    if missing := [name for name in names if name not in arrays]:
        raise RegraftError(
            f"'{path}' has no array '{missing[0]}': it needs pixel_values and labels"
        )
    return arrays


def _check_array(archive: zipfile.ZipFile, name: str, path: str) -> None:
    """RegraftError when an array's header does not fit its bytes, or these the memory.

    NumPy takes memory for whatever a header says before it reads any values.
    """
    facts = archive.getinfo(name)
    with archive.open(name) as stream:
        version = numpy.lib.format.read_magic(stream)
        kind = "1_0" if version == (1, 0) else "2_0"
        read_header = getattr(numpy.lib.format, f"read_array_header_{kind}")
        shape, _, dtype = read_header(stream)
        held = facts.file_size - stream.tell()

    needed = math.prod(shape) * dtype.itemsize
    if needed != held:
        raise RegraftError(
            f"'{path}' has {held:,} bytes for '{name}' of shape {shorten(list(shape))} and dtype"
            f" {dtype}, which has {needed:,}: save it again with numpy.savez"
        )
    if needed > max(MAX_PACKED_BYTES, MAX_RATIO * facts.compress_size):
        raise RegraftError(
            f"'{path}' has {needed:,} bytes for '{name}' that are compressed more than {MAX_RATIO}"
            " to 1: save it with numpy.savez, which does not compress"
        )
    free = free_memory()
    if free is not None and needed > free:
        raise RegraftError(
            f"'{path}' needs {needed:,} bytes of memory for '{name}', there are {free:,}: "
            "give fewer images, or use a machine with more"
        )
