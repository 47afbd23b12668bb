"""Folders of sentence-transformers: modules.json, and what stands behind the transformer.

The transformer lies at the top; the other modules have a folder each, such as `1_Pooling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io.files import check_inside, read_json

MODULES = "modules.json"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"  # of a module, in its folder
WIDTHS = ("word_embedding_dimension", "embedding_dimension")  # keys of a pooling's config
WIDTHLESS = ("Pooling", "Normalize", "Dropout")  # modules that take vectors of any width


@dataclass(frozen=True)
class Module:
    """A module behind the transformer.

    Attributes:
        path: of its folder.
        kind: its class without the package, such as `Pooling`.
    """

    path: str
    kind: str


def read_modules(folder: Path) -> list[Module]:
    """The modules behind the transformer, in order; none without modules.json.

    RegraftError when the file is damaged, when the transformer lies in a folder of its own, or when
    a module lies outside of the folder.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    check_inside(folder, file)
    first, *others = read_json(file, list[dict[str, Any]]) or [{}]
    if inner := str(first.get("path") or "").strip("./"):
        raise RegraftError(
            f"'{file}' has its transformer in '{inner}': move the files of '{folder / inner}' up"
            f" into '{folder}', and make its path in {MODULES} empty"
        )
    modules = [
        Module(str(row.get("path") or ""), str(row.get("type")).rpartition(".")[2])
        for row in others
    ]
    for module in modules:
        path = Path(module.path)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise RegraftError(f"'{file}' has a module in '{path}': give it a folder beside it")
    return modules


def find_module_weights(folder: Path) -> set[str]:
    """Weights of modules, by path in the folder; they travel as they are.

    RegraftError for a module that has its weights in a pickle alone.
    """
    found = set()
    for module in read_modules(folder):
        weights, pickled = (folder / module.path / name for name in (WEIGHTS, PICKLE))
        if weights.is_file():
            check_inside(folder, weights)
            found.add(weights.relative_to(folder).as_posix())
        elif pickled.is_file():
            raise RegraftError(
                f"'{pickled}' is a pickle, which is never copied, and {MODULES} needs it: save it "
                f"as {WEIGHTS} first"
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
        if module.kind not in WIDTHLESS:
            raise RegraftError(
                f"module '{module.path}' ({module.kind}) of '{folder / MODULES}' takes vectors of"
                f" width {old}, the result gives {new}: grow other sizes than hidden, or take the"
                f" module out of {MODULES}"
            )
        file = folder / module.path / "config.json"
        if module.kind == "Pooling" and file.is_file():
            check_inside(folder, file)
            config = read_json(file)
            if keys := [key for key in WIDTHS if config.get(key) == old]:
                name = file.relative_to(folder).as_posix()
                changed[name] = config | dict.fromkeys(keys, new)
    return changed
