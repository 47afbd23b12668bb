"""A path that stands for a model with a PEFT adapter: a small file in regraft's cache.

As for the file of a variant, whatever takes the path of a model takes it too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

from ..errors import RegraftError
from .files import read_own_json, write_json
from .foreign_weights import ADAPTER
from .gguf import cache_folder

ENDING = ".adapted.json"
WEIGHTS = "adapter_model.safetensors"


class Adapted(TypedDict):
    """A model with an adapter."""

    base: str  # absolute path of the model
    adapter: str  # absolute path of the adapter's folder


def adapted_path(base: str | Path, adapter: str | Path) -> str:
    """The path that stands for a model with an adapter merged into it; no weight is read.

    Args:
        base: path of the model.
        adapter: the adapter's folder, as PEFT's `save_pretrained` writes it.

    RegraftError when the folder is none of an adapter.
    """
    folder = Path(adapter)
    if not (folder / ADAPTER).is_file():
        raise RegraftError(
            f"'{folder}' is no adapter (it has no {ADAPTER}): give a folder that PEFT's "
            "save_pretrained wrote"
        )
    if not (folder / WEIGHTS).is_file():
        raise RegraftError(
            f"the adapter '{folder}' has no {WEIGHTS}: save it again with PEFT, which writes "
            "safetensors (an adapter_model.bin is a pickle, which is never loaded)"
        )
    known: Adapted = {"base": str(Path(base).absolute()), "adapter": str(folder.absolute())}
    digest = hashlib.sha256("\0".join((known["base"], known["adapter"])).encode()).hexdigest()
    file = cache_folder() / "adapted" / f"{digest[:16]}{ENDING}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
    return str(file)


def read_adapted(path: str | Path) -> Adapted | None:
    """The model and the adapter that a path stands for; None for any other path."""
    file = Path(path)
    if not file.name.endswith(ENDING) or not file.is_file():
        return None
    known: Adapted = read_own_json(file, Adapted, "give the model and --adapter again")
    return known


def find_base(path: str | Path) -> Path:
    """The path of the model, without the adapter that a path may stand for."""
    known = read_adapted(path)
    return Path(known["base"]) if known else Path(path)
