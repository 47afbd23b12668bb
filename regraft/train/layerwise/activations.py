"""Hidden states between two layers, kept in a file row by row: memory holds only the rows that are asked for."""

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
    """What goes into every layer for some rows of text, each (length, width): the file `hidden-RANK.LAYER` in `folder`.

    A file has its name once it is whole, so that a killed run finds its last whole layer. `rows`: the numbers of the
    rows that are kept, ascending. A folder in memory (/dev/shm) keeps them there.
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
        """Where the input of a layer is."""
        return self.folder / f"hidden-{self.rank}.{layer}"

    def has_layer(self, layer: int) -> bool:
        """Whether the whole input of a layer is there."""
        return (
            self.layer_path(layer).is_file()
            and self.layer_path(layer).stat().st_size == len(self) * self.stride
        )

    def check_disk_space(self) -> None:
        """RegraftError when the disk has no room for the inputs of two layers, which is what is kept at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = sum(file.stat().st_size for file in self.folder.glob(f"hidden-{self.rank}.*"))
        free, needed = shutil.disk_usage(self.folder).free + held, 2 * len(self) * self.stride
        if free < needed:
            raise RegraftError(
                f"'{self.folder}' has {free:,} bytes free, the hidden states of {len(self)} rows take {needed:,}: give "
                "another folder, fewer tokens, or keep them as bfloat16"
            )

    def read_rows(self, layer: int, numbers: Tensor) -> Tensor:
        """Rows by their number in the text, (rows, length, width) in float32."""
        found = torch.empty(len(numbers), *self.shape, dtype=self.dtype)
        with open(self.layer_path(layer), "rb", buffering=0) as file:
            for at, place in enumerate(torch.searchsorted(self.rows, numbers).tolist()):
                file.seek(place * self.stride)
                view = found[at].view(torch.uint8).numpy().reshape(-1).data
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise RegraftError(
                            f"'{self.layer_path(layer)}' ends too early: delete the folder and run again"
                        )
                    view = view[count:]
        return found.float()

    def open_writer(self, layer: int) -> ActivationWriter:
        """A file to be filled in order."""
        return ActivationWriter(self, layer)

    def delete_before(self, before: int) -> None:
        """Delete the inputs of earlier layers, and what was left half-written."""
        for file in self.folder.glob(f"hidden-{self.rank}.*"):
            number = file.name.split(".")[1]
            if file.suffix == ".part" or int(number) < before:
                file.unlink()


class ActivationWriter:
    """The input of one layer while it is written, rows in order; it gets its name when the block ends well."""

    def __init__(self, hidden: ActivationStore, layer: int):
        self.hidden, self.target = hidden, hidden.layer_path(layer)
        self.part = self.target.with_name(f"{self.target.name}.part")

    def __enter__(self) -> ActivationWriter:
        self.stream = open(self.part, "wb", buffering=0)
        return self

    def append(self, values: Tensor) -> None:
        """The next rows, (rows, length, width)."""
        view = (
            values.to("cpu", self.hidden.dtype)
            .contiguous()
            .view(torch.uint8)
            .numpy()
            .reshape(-1)
            .data
        )
        try:
            while view:
                view = view[self.stream.write(view) :]
        except OSError as error:
            raise RegraftError(
                f"cannot write '{self.part}' ({error}): free some space and run the same command again"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            os.fsync(self.stream.fileno())
        self.stream.close()
        if kind is None:
            self.part.rename(self.target)
