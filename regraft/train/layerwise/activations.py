"""Hidden states between two layers, in a file: memory holds only the rows that are read."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ...errors import RegraftError

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ActivationStore:
    """The input of every layer for some rows of text, as a file `hidden-RANK.LAYER` each.

    A file takes its name when it is complete, so that a killed run finds the last complete layer.

    RegraftError for a precision that is not known.

    Attributes:
        folder: where the files are; one in /dev/shm keeps them in memory.
        rank: the process they belong to.
        rows: numbers in the text of the rows that are stored, ascending.
        shape: (time, hidden) of a row.
        dtype: in which it is stored.
        stride: bytes of a row.
    """

    def __init__(self, folder: Path, rank: int, rows: Tensor, length: int, width: int, kind: str):
        if kind not in KINDS:
            raise RegraftError(f"hidden states are kept as '{kind}': use one of {', '.join(KINDS)}")
        self.folder, self.rank, self.rows = folder, rank, rows
        self.shape, self.dtype = (length, width), KINDS[kind]
        self.stride = math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    def layer_path(self, layer: int) -> Path:
        """The file with the input of a layer."""
        return self.folder / f"hidden-{self.rank}.{layer}"

    def has_layer(self, layer: int) -> bool:
        """Whether the complete input of a layer is there."""
        file = self.layer_path(layer)
        return file.is_file() and file.stat().st_size == len(self) * self.stride

    def check_disk_space(self) -> None:
        """RegraftError when the disk has no room for two layers' inputs, which is what is needed.

        Files that an earlier run has left count as free: they will be overwritten.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        own = sum(file.stat().st_size for file in self.folder.glob(f"hidden-{self.rank}.*"))
        free, needed = shutil.disk_usage(self.folder).free + own, 2 * len(self) * self.stride
        if free < needed:
            raise RegraftError(
                f"'{self.folder}' has {free:,} bytes free, the hidden states of {len(self)} rows "
                f"take {needed:,}: give another folder, fewer tokens, or keep them as bfloat16"
            )

    def read_rows(self, layer: int, numbers: Tensor) -> Tensor:
        """Read rows of a layer's input.

        Args:
            layer: number of the layer.
            numbers: the rows' numbers in the text, (rows,).

        Returns:
            (rows, time, hidden) in float32.
        """
        found = torch.empty(len(numbers), *self.shape, dtype=self.dtype)

        # Unbuffered, straight into the tensor: no second copy of the rows is in memory.
        with open(self.layer_path(layer), "rb", buffering=0) as file:
            for number, position in enumerate(torch.searchsorted(self.rows, numbers).tolist()):
                file.seek(position * self.stride)
                view = found[number].view(torch.uint8).numpy().reshape(-1).data
                while view:  # one read may give fewer bytes than it was asked for
                    count = file.readinto(view)
                    if not count:
                        raise RegraftError(
                            f"'{self.layer_path(layer)}' ends too early: "
                            "delete the folder and run again"
                        )
                    view = view[count:]

        return found.float()

    def open_writer(self, layer: int) -> ActivationWriter:
        """A writer for the input of a layer."""
        return ActivationWriter(self, layer)

    def delete_before(self, before: int) -> None:
        """Delete the inputs of earlier layers and incomplete files."""
        for file in self.folder.glob(f"hidden-{self.rank}.*"):
            number = file.name.split(".")[1]
            if file.suffix == ".part" or int(number) < before:
                file.unlink()


class ActivationWriter:
    """Writes the input of one layer, rows in order; use it as a context.

    The file takes its name when the block ends without an error.
    """

    def __init__(self, store: ActivationStore, layer: int):
        self.store, self.target = store, store.layer_path(layer)
        self.part = self.target.with_name(f"{self.target.name}.part")

    def __enter__(self) -> ActivationWriter:
        self.stream = open(self.part, "wb", buffering=0)
        return self

    def append(self, values: Tensor) -> None:
        """Write the next rows, (rows, time, hidden); RegraftError on a full disk."""
        stored = values.to("cpu", self.store.dtype).contiguous()
        view = stored.view(torch.uint8).numpy().reshape(-1).data
        try:
            while view:  # one write may take fewer bytes than it was given
                view = view[self.stream.write(view) :]
        except OSError as error:
            raise RegraftError(
                f"cannot write '{self.part}' ({error}): "
                "free some space and run the same command again"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            os.fsync(self.stream.fileno())
        self.stream.close()
        if kind is None:
            self.part.rename(self.target)
