"""Adam's state grows with the weights: moments and step counts of every parameter, under the grown
model's names (docs/concepts/expansions.md, section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint, Holds, LazyTensor, Provenance
from ..core.moments import MOMENTS, STEP
from ..errors import RegraftError
from ..io.safetensors import TensorEntry, read_header, save_tensors

Steps = Sequence[Callable[[Checkpoint], Checkpoint]]


def grow_optimizer_state(
    source: Checkpoint, steps: Steps, file: str | Path, out: str | Path
) -> int:
    """Write the file `out` with `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` of the grown
    model.

    Moments of weights stored c-fold are divided by c and c squared; new entries start at zero and
    at the tensor's mean square. RegraftError when the file lacks a parameter or has one too many.

    Args:
        source: the checkpoint before growth.
        steps: the steps that grow it.
        file: the same keys for `source`, as `regraft train --keep-moments` writes them.
        out: the file to write; `optimizer.safetensors` in the grown model's folder.

    Returns:
        The number of parameters.
    """
    entries = read_moments(source, Path(file))

    # A step grows a checkpoint of moments by the gradient law: what is multiplied by c has its
    # gradient divided by c.
    table: dict[str, torch.Tensor] = {}
    for holds in MOMENTS:
        grown = build_moment_checkpoint(source, entries, holds)
        for step in steps:
            grown = step(grown)
        table |= {
            f"{holds}/{grown.names[key]}": lazy.read().contiguous()
            for key, lazy in grown.tensors.items()
        }

    # New parameters take the step count of the old ones, so that bias correction is the same.
    counts = [entry.read() for key, entry in entries.items() if key.startswith(f"{STEP}/")]
    steps_done = max((count.reshape(()) for count in counts), default=torch.tensor(0.0))
    table |= {f"{STEP}/{name}": steps_done.clone() for name in grown.names.values()}
    save_tensors(Path(out), table)
    return len(grown.names)


def check_growable(source: Checkpoint, steps: Steps, file: Path) -> None:
    """RegraftError when a file does not have the source's moments, or a step cannot grow them."""
    grown = build_moment_checkpoint(source, read_moments(source, file), MOMENTS[0])
    for step in steps:
        grown = step(grown)


def read_moments(source: Checkpoint, file: Path) -> dict[str, TensorEntry]:
    """The entries of a file of moments by key.

    RegraftError when there is no such file, or it does not have the moments of exactly the source's
    parameters.
    """
    if not file.is_file():
        raise RegraftError(
            f"no optimiser state at '{file}': give safetensors with exp_avg/NAME and"
            " exp_avg_sq/NAME"
        )
    if file.suffix in (".pt", ".bin", ".pth"):
        raise RegraftError(
            f"'{file}' is a pickle, which is never loaded: save its moments with safetensors as"
            " exp_avg/NAME, exp_avg_sq/NAME and step/NAME"
        )
    entries: dict[str, TensorEntry] = {}
    for entry in read_header(file):
        kind, slash, name = entry.name.partition("/")
        entries[f"{kind}{slash}{source.anatomy.canonical_name(name)}"] = entry

    # Every parameter has both moments, and nothing else is in the file.
    wanted = {f"{moment}/{name}" for moment in MOMENTS for name in source.names.values()}
    if missing := sorted(wanted - set(entries)):
        raise RegraftError(
            f"'{file}' lacks '{missing[0]}': it belongs to another model or to a stage that"
            " froze it"
        )
    known = (f"{STEP}/", "model/")
    if extra := sorted(key for key in set(entries) - wanted if not key.startswith(known)):
        raise RegraftError(
            f"'{file}' has '{extra[0]}', which '{source.origin}' has not: give the state of this"
            " model"
        )
    return entries


def build_moment_checkpoint(
    source: Checkpoint, entries: dict[str, TensorEntry], holds: Holds
) -> Checkpoint:
    """The source with a moment in place of every weight; RegraftError when shapes differ.

    Args:
        source: the checkpoint whose weights the moments are of.
        entries: the moments by key.
        holds: which moment.
    """

    def open_moment(key: Key) -> LazyTensor:
        entry, shape = entries[f"{holds}/{source.names[key]}"], source.tensors[key].shape
        entry = replace(entry, allow_nonfinite=source.allow_nonfinite)
        if entry.shape != shape:
            raise RegraftError(
                f"'{entry.name}' in '{entry.file}' has shape {list(entry.shape)}, its weight"
                f" {list(shape)}: give the state of this model"
            )
        return LazyTensor(
            shape, entry.torch_dtype(), Provenance("copied", (entry.name,)), entry.read
        )

    return replace(source, tensors={key: open_moment(key) for key in source.tensors}, holds=holds)
