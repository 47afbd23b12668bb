"""Folders of sentence-transformers: modules.json, and what stands behind the transformer.

The transformer lies at the top; the other modules have a folder each, such as `1_Pooling`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io.files import read_json

MODULES = "modules.json"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"  # of a module, in its folder
WIDTHS = ("word_embedding_dimension", "embedding_dimension")  # keys of a pooling's config
WIDTHLESS = ("Pooling", "Normalize", "Dropout")  # modules that take vectors of any width


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """The modules behind the transformer, in order; none without modules.json.

    RegraftError when the transformer lies in a folder of its own, or a module outside of the
    folder.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    first, *others = read_json(file, list[dict[str, Any]]) or [{}]
    if inner := str(first.get("path") or "").strip("./"):
        raise RegraftError(
            f"'{file}' has its transformer in '{inner}': give '{folder / inner}', and the rest of"
            " the folder its new path"
        )
    for module in others:
        path = Path(str(module.get("path") or ""))
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise RegraftError(f"'{file}' has a module in '{path}': give it a folder beside it")
    return others


def module_type(module: dict[str, Any]) -> str:
    """The class of a module without its package, such as `Pooling`."""
    return str(module.get("type")).rpartition(".")[2]


def find_module_weights(folder: Path) -> set[str]:
    """Weights of modules, by path in the folder; they travel as they are.

    RegraftError for a module that has its weights in a pickle alone.
    """
    found = set()
    for module in read_modules(folder):
        path = Path(module["path"])
        if (folder / path / WEIGHTS).is_file():
            found.add((path / WEIGHTS).as_posix())
        elif (folder / path / PICKLE).is_file():
            raise RegraftError(
                f"'{folder / path / PICKLE}' is a pickle, which is never copied, and {MODULES}"
                f" needs it: save it as {WEIGHTS} first"
            )
    return found


def resize_modules(folder: Path, old: int, new: int) -> dict[str, Any]:
    """Configs of modules that change with the transformer's width, by path in the folder.

    RegraftError for a module whose own weights are made for the old width.

    Args:
        folder: of the source.
        old: hidden size of the source.
        new: hidden size of the result.
    """
    changed: dict[str, Any] = {}
    for module in read_modules(folder) if new != old else ():
        kind, file = module_type(module), folder / module["path"] / "config.json"
        if kind not in WIDTHLESS:
            raise RegraftError(
                f"module '{module['path']}' ({kind}) of '{folder / MODULES}' takes vectors of width"
                f" {old}, the result gives {new}: grow other sizes than hidden, or take the module"
                f" out of {MODULES}"
            )
        config = read_json(file) if kind == "Pooling" and file.is_file() else {}
        keys = [key for key in WIDTHS if config.get(key) == old]
        if keys:
            name = file.relative_to(folder).as_posix()
            changed[name] = config | dict.fromkeys(keys, new)
    return changed
