"""The code that travels with a linearized model, so that `trust_remote_code=True` loads it without regraft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..mixers.registry import mixer_class

HOST_FILES = ("configuration_regraft", "modeling_regraft", "states")
REGISTRY = '''"""Mixers of this model by name."""

from __future__ import annotations

from typing import Any

from .base import Attention, Mixer
{imports}

MIXERS: dict[str, type[Mixer]] = {{mixer.name: mixer for mixer in ({classes})}}


def mixer_class(name: str) -> type[Mixer]:
    """The class registered as `name`."""
    return MIXERS[name]


def build(spec: dict[str, Any], attention: Attention) -> Mixer:
    """The mixer of a spec with uninitialised weights."""
    return mixer_class(spec["name"])(attention, spec)
'''


def used_classes(config: dict[str, Any]) -> list[type]:
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


def write(directory: str | Path, config: dict[str, Any]) -> list[str]:
    """Copy the classes this model needs into `directory`, flat, with imports made relative; returns the file names."""
    package = Path(__file__).parent.parent
    directory = Path(directory)
    classes = used_classes(config)
    modules = {cls.__module__.rsplit(".", 1)[1] for cls in classes} - {"gated"}
    files = [package / "hosts" / f"{name}.py" for name in HOST_FILES]
    files += [package / "mixers" / f"{name}.py" for name in sorted(modules | {"base", "recurrence"})]
    files.append(package / "errors.py")
    gated = any(cls.__module__.endswith(".gated") for cls in classes)
    if gated:
        files.append(package / "mixers" / "gated.py")
    for file in files:
        (directory / file.name).write_text(flat(file.read_text()))
    plain = [cls for cls in classes if not cls.__module__.endswith(".gated")]
    (directory / "registry.py").write_text(registry_text(plain, gated))
    return [file.name for file in files] + ["registry.py"]


def flat(text: str) -> str:
    """Imports of sibling folders as imports of sibling files."""
    return re.sub(r"from \.\.(?:mixers\.|hosts\.)?(\w+) import", r"from .\1 import", text)


def registry_text(classes: list[type], gated: bool) -> str:
    """Source of the flat registry; the combinator imports it, so it is looked up when first asked for."""
    imports = "\n".join(f"from .{cls.__module__.rsplit('.', 1)[1]} import {cls.__name__}" for cls in classes)
    text = REGISTRY.format(imports=imports, classes="".join(f"{cls.__name__}, " for cls in classes))
    if not gated:
        return text
    lookup = (
        '    if name == "gated":\n        from .gated import Gated\n\n        return Gated\n    return MIXERS[name]'
    )
    return text.replace("    return MIXERS[name]", lookup)
