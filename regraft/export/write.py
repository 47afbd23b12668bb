"""Writing an export, whole or not at all, once it is proven equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..io.identity import TOKENIZER
from ..io.output import read_marker
from ..modeling.reopen import prove_opens
from .equality import Equality, compare_exported
from .step import Export
from .target import find_target, list_targets


def list_misfits(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """By target, what of a model it cannot hold; an empty list where it holds it."""
    return {name: find_target(name).find_misfits(checkpoint.config) for name in list_targets()}


def list_notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know of an export beyond what it is."""
    if any(file for pattern in TOKENIZER for file in checkpoint.path.glob(pattern)):
        return []
    return [
        f"'{checkpoint.origin}' has no tokenizer, so the export has none: put tokenizer.json there"
    ]


def check_finished(checkpoint: Checkpoint) -> None:
    """RegraftError for the output of a run of regraft that is not finished."""
    marker = read_marker(checkpoint.folder) if checkpoint.folder else None
    if marker is not None and not marker.complete:
        raise RegraftError(
            f"'{checkpoint.origin}' is an unfinished {marker.kind}: run its command again, which "
            "goes on, then export it"
        )


def write_export(
    checkpoint: Checkpoint, to: str, out: str | Path, check: bool = True, **options: Any
) -> Equality | None:
    """Write a model in a target's form; what was compared, None without `check`.

    Args:
        checkpoint: as opened.
        to: name of the target.
        out: the directory to write.
        check: whether the result is compared with the model in plain transformers before it is put
            in place.
        options: further arguments of `Checkpoint.save`.

    RegraftError when the target cannot hold the model, when it is unfinished, when the two differ,
    and as of `Checkpoint.save`.
    """
    check_finished(checkpoint)
    made = Export(to)(checkpoint)
    found: list[Equality] = []

    def prove(folder: Path) -> None:
        prove_opens(folder)
        if check:
            model = modeling.load_stored(checkpoint)
            found.append(compare_exported(model, checkpoint, folder, find_target(to).code))

    made.save(out, prove_opens=prove, **options)
    return found[0] if found else None
