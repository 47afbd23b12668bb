"""Pickled weights as safetensors: PyTorch's own reader, which takes tensors and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RegraftError, explain_errors
from ..io import output, safetensors, shard_writer
from ..io.files import check_inside, read_json, write_json
from .side_files import walk

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"pytorch_model(?P<number>-\d+-of-\d+)?\.bin")


def find_pickles(folder: Path) -> list[Path]:
    """The files of pickled weights of a model without safetensors; none where it has those.

    RegraftError when the index lists one that is not there, or that lies elsewhere.
    """
    if not folder.is_dir() or any(folder.glob("model*.safetensors*")):
        return []
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(read_json(index, safetensors.ShardIndex)["weight_map"].values()))
    else:
        names = [SINGLE] if (folder / SINGLE).is_file() else []
    for name in names:
        if not SHARD.fullmatch(name) or not (folder / name).is_file():
            raise RegraftError(f"'{folder}' lacks '{name}' that {INDEX} lists: fetch it")
        check_inside(folder, folder / name)
    return [folder / name for name in names]


def convert_pickles(
    folder: Path,
    out: Path,
    overwrite: bool = False,
    request: Any = None,
    progress: Callable[[float, str], None] = lambda share, note: None,
) -> None:
    """Write a model with pickled weights as the same model with safetensors, a file at a time.

    The files beside the weights are copied as they are; code and other weights are not.

    Args:
        folder: of the model.
        out: directory to write.
        overwrite: whether it may replace an output of regraft.
        request: what the command was asked for.
        progress: called with the share that is done.

    RegraftError when a file holds anything but tensors, which is not run.
    """
    files = find_pickles(folder)
    output.check_apart(out, [("source", folder)])
    with shard_writer.new_directory(out, overwrite, request=request) as partial:
        weight_map: dict[str, str] = {}
        total = 0
        for number, file in enumerate(files):
            progress(number / len(files), file.name)
            name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = read_pickle(file)
            safetensors.save_tensors(partial.path / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(value.nbytes for value in tensors.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial.path / safetensors.INDEX, index)
        for path, reason in walk(folder, folder):
            if reason is None:
                target = partial.path / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        safetensors.read_entries(partial.path)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, each with memory of its own.

    RegraftError when PyTorch's reader of tensors meets anything else, or the file is damaged.
    """
    what = f"cannot read tensors from the pickle '{file}'"
    with explain_errors(what, "nothing of it was run; take safetensors from its author"):
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise RegraftError(
            f"'{file}' holds a {type(values).__name__} that is not only tensors: give the state "
            "dict of a model, as save_pretrained wrote it"
        )
    return {str(name): value.detach().clone().contiguous() for name, value in values.items()}
