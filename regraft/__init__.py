"""regraft: reuse pretrained Hugging Face weights in a different architecture.

Public names are imported when they are first used, so that `import regraft` and the command line
start without PyTorch. `import regraft.modeling` (which `regraft.load` does) registers linearized
models with transformers' `AutoConfig` and `AutoModelForCausalLM`; `import regraft` alone does not.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.checkpoint import Checkpoint

__version__ = "0.1.0"


def _read_stub() -> dict[str, tuple[str, str]]:
    """Public name -> (module, name in that module), from the imports in __init__.pyi."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: (f"{__name__}.{node.module}", alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


_PUBLIC = _read_stub()

# `open` is public as regraft.open, but stays out of this list: `from regraft import *` must not
# replace Python's own.
__all__ = sorted(_PUBLIC)


def open(path: str) -> Checkpoint:  # noqa: A001  # the name users type: regraft.open(path)
    """Open a model directory or GGUF file without reading weights."""
    from .core.checkpoint import Checkpoint

    return Checkpoint.open(path)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
