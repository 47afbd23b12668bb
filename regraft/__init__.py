"""regraft: reuse pretrained Hugging Face weights in a different architecture.

Public names are imported when they are first used, so that `import regraft` and the command line
start without PyTorch. `import regraft.modeling` (which `regraft.load` does) registers linearized
models with transformers' auto classes; `import regraft` alone does not.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The one list of public names: type checkers and editors read it here, `_PUBLIC` is made from it.
if TYPE_CHECKING:
    from .checks.check import check
    from .core.checkpoint import Checkpoint
    from .errors import RegraftError
    from .evaluation.evaluate import evaluate_recall, evaluate_tasks
    from .growth.steps.add_experts import AddExperts
    from .growth.steps.adopt import Adopt, Carry
    from .growth.steps.bridge import Bridge
    from .growth.steps.composable import (
        AddHeads,
        AddLayers,
        GrowHeadDim,
        GrowHeadValues,
        GrowHidden,
        GrowMLP,
        GrowQueryKeys,
    )
    from .growth.steps.deepen import Deepen
    from .growth.steps.grow_vocab import GrowVocab
    from .growth.steps.take_text import TakeText
    from .growth.steps.transplant import Transplant
    from .growth.steps.untie import Tie, Untie
    from .growth.steps.widen import Widen
    from .linearize.merge import Merge
    from .mixers.remix import Remix
    from .modeling import flops
    from .modeling.generate import generate
    from .modeling.loading import load
    from .plan.plan import Plan
    from .recipes.run import run_recipe
    from .recipes.schema import Recipe

__version__ = "0.1.0"


def _read_public_names() -> dict[str, tuple[str, str]]:
    """Public name -> (module, name in that module), from the TYPE_CHECKING block of this file."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: (f"{__name__}.{node.module}", alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


_PUBLIC = _read_public_names()

# `open` is public as regraft.open, but stays out of this list: `from regraft import *` must not
# replace Python's own.
__all__ = sorted(_PUBLIC)


def open(  # noqa: A001  # the name users type: regraft.open(path)
    path: str, variant: str | None = None
) -> Checkpoint:
    """Open a model directory or GGUF file without reading weights.

    Args:
        path: the directory or file.
        variant: of the weights in a directory, such as "fp16".
    """
    from .core.checkpoint import Checkpoint

    return Checkpoint.open(path, variant=variant)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "open", "__version__", "__doc__", "__file__", "__path__"])
