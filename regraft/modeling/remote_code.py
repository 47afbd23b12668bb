"""The code that travels with a linearized model, so that `trust_remote_code=True` loads it without regraft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..mixers.base import Mixer
from ..mixers.registry import mixer_class

HOST_FILES = ("configuration_regraft", "modeling_regraft", "cache")
REGISTRY = '''"""Mixers of this model by name."""

from __future__ import annotations

from typing import Any

from .base import Attention, Mixer


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


def used_classes(config: dict[str, Any]) -> list[type[Mixer]]:
    """Mixer classes that a config names, nested ones included."""
    names: dict[str, None] = {}

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
    """Copy the classes this model needs into `directory`, flat, with imports made relative; returns the file names."""
    package = Path(__file__).parent.parent
    directory = Path(directory)
    classes = used_classes(config)
    modules = with_siblings(package / "mixers", {"base", *(module_of(cls) for cls in classes)})
    files = [package / "modeling" / f"{name}.py" for name in HOST_FILES]
    files += [package / "mixers" / f"{name}.py" for name in sorted(modules)]
    files.append(package / "errors.py")
    for file in files:
        (directory / file.name).write_text(flatten_imports(file.read_text()))
    (directory / "registry.py").write_text(registry_text(classes))
    return [file.name for file in files] + ["registry.py"]


def module_of(cls: type) -> str:
    """Name of the file that defines a mixer."""
    return cls.__module__.rsplit(".", 1)[1]


def with_siblings(folder: Path, modules: set[str]) -> set[str]:
    """Modules of a folder with all that they import from it; the registry is written anew."""
    texts = [(folder / f"{name}.py").read_text() for name in modules]
    found = {name for text in texts for name in re.findall(r"^from \.(\w+) import", text, re.M)} - {
        "registry"
    }
    return modules if found <= modules else with_siblings(folder, modules | found)


def flatten_imports(text: str) -> str:
    """Imports of sibling folders as imports of sibling files."""
    return re.sub(r"from \.\.(?:mixers\.|modeling\.)?(\w+) import", r"from .\1 import", text)


def registry_text(classes: list[type[Mixer]]) -> str:
    """Source of the flat registry."""
    cases = [CASE.format(name=cls.name, module=module_of(cls), cls=cls.__name__) for cls in classes]
    return REGISTRY.format(cases="".join(cases))
