"""The code that is saved with a linearized model.

With it `trust_remote_code=True` loads the model where regraft is not installed. The files of this
package that the model needs are copied into one flat folder, and their imports of each other are
rewritten to match.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..mixers.base import Mixer
from ..mixers.registry import mixer_class

PACKAGE = Path(__file__).parent.parent
MODELING_FILES = (
    "configuration_regraft",
    "modeling_regraft",
    "mixer_slot",
    "cache",
    "growing_cache",
)
MIXER_FILES = ("base", "older_names")  # of every model

# Modules that are written anew instead of copied: the registry, which finds mixers by folder, and
# the tensor types, which need jaxtyping.
REGISTRY = '''"""Mixers of this model by name."""

from __future__ import annotations

from typing import Any

from .attention import Attention
from .base import Mixer


def mixer_class(name: str) -> type[Mixer]:
    """The class registered as `name`; imported when asked for, since combinators ask too."""
{cases}    raise KeyError(name)


def build(spec: dict[str, Any], attention: Attention) -> Mixer:
    """The mixer of a spec with uninitialised weights."""
    return mixer_class(spec["name"])(attention, spec)
'''
CASE = """    if name == "{name}":
        from .{module} import {cls}

        return {cls}
"""
SHAPES = '''"""Names for the tensor types in annotations, which are never evaluated."""

Bool = Float = Int = object
'''


def used_classes(config: dict[str, Any]) -> list[type[Mixer]]:
    """Mixer classes that a config names, nested ones included."""
    names: dict[str, None] = {}  # as an ordered set

    def visit(spec: dict[str, Any]) -> None:
        names[spec["name"]] = None
        for value in vars(mixer_class(spec["name"]).parse(spec)).values():
            if isinstance(value, dict):
                visit(value)

    for spec in config["mixers"]:
        if spec is not None:
            visit(spec)
    return [mixer_class(name) for name in names]


def write_remote_code(directory: str | Path, config: dict[str, Any]) -> list[str]:
    """Write the code that a model needs, flat; returns the names of the files.

    Args:
        directory: of the saved model.
        config: of the model, which names its mixers.
    """
    directory = Path(directory)
    classes = used_classes(config)
    mixers = with_siblings(PACKAGE / "mixers", {*MIXER_FILES, *map(module_of, classes)})
    files = [PACKAGE / "modeling" / f"{name}.py" for name in MODELING_FILES]
    files += [PACKAGE / "mixers" / f"{name}.py" for name in sorted(mixers)]
    files += [PACKAGE / "errors.py", PACKAGE / "core" / "auto_map.py"]

    texts = {file.name: flatten_imports(file.read_text(encoding="utf-8")) for file in files}
    texts |= {"registry.py": registry_text(classes), "shapes.py": SHAPES}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return list(texts)


def module_of(cls: type) -> str:
    """Name of the file that defines a mixer."""
    return cls.__module__.rsplit(".", 1)[1]


def with_siblings(folder: Path, modules: set[str]) -> set[str]:
    """Modules of a folder with all that they import from it, but the registry."""
    found = set(modules)
    waiting = list(modules)
    while waiting:
        text = (folder / f"{waiting.pop()}.py").read_text(encoding="utf-8")
        for node in relative_imports(ast.parse(text)):
            # level 1 is a sibling: `from .base import Mixer`
            name = node.module if node.level == 1 else None
            if name is not None and name != "registry" and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def flatten_imports(text: str) -> str:
    """Source with every import from this package as one from a file of the same folder.

    `from ..core.shapes import Float` becomes `from .shapes import Float`.
    """
    lines = text.splitlines(keepends=True)
    # Last first: a rewritten import may have fewer lines, which moves all below it.
    for node in sorted(relative_imports(ast.parse(text)), key=lambda node: -node.lineno):
        if node.module is not None:
            module = node.module.rsplit(".", 1)[-1]
            flat = ast.ImportFrom(module, node.names, level=1)
            lines[node.lineno - 1 : node.end_lineno] = [
                f"{' ' * node.col_offset}{ast.unparse(flat)}\n"
            ]
    return "".join(lines)


def relative_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Every `from .module import name` of a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield node


def registry_text(classes: list[type[Mixer]]) -> str:
    """Source of the flat registry."""
    cases = [CASE.format(name=cls.name, module=module_of(cls), cls=cls.__name__) for cls in classes]
    return REGISTRY.format(cases="".join(cases))
