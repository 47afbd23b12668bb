"""regraft: reuse the weights of a pretrained transformer in a different architecture.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` of transformers know linearized models, whichever of the two
is imported first. Public names load when first used, so that the command line starts without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .checks.check import check
    from .core.checkpoint import Checkpoint
    from .errors import RegraftError
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
    from .growth.steps.transplant import Transplant
    from .growth.steps.widen import Widen
    from .linearize.merge import Merge
    from .mixers.remix import Remix
    from .modeling import load
    from .plan.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "AddHeads",
    "AddLayers",
    "Bridge",
    "Checkpoint",
    "Deepen",
    "GrowHeadDim",
    "GrowHeadValues",
    "GrowHidden",
    "GrowMLP",
    "GrowQueryKeys",
    "Merge",
    "Plan",
    "RegraftError",
    "Remix",
    "Transplant",
    "Widen",
    "check",
    "load",
    "open",
]

_COMPOSABLE = (
    "AddHeads",
    "AddLayers",
    "GrowHeadDim",
    "GrowHeadValues",
    "GrowHidden",
    "GrowMLP",
    "GrowQueryKeys",
)
_HOMES = dict.fromkeys(_COMPOSABLE, "growth.steps.composable") | {
    "Bridge": "growth.steps.bridge",
    "Checkpoint": "core.checkpoint",
    "Deepen": "growth.steps.deepen",
    "Merge": "linearize.merge",
    "Plan": "plan.plan",
    "RegraftError": "errors",
    "Remix": "mixers.remix",
    "Transplant": "growth.steps.transplant",
    "Widen": "growth.steps.widen",
    "check": "checks.check",
    "load": "modeling",
}


def open(path: str) -> Checkpoint:  # noqa: A001  # the name users type: regraft.open(path)
    """Open a model directory or GGUF file without reading weights."""
    from .core.checkpoint import Checkpoint

    return Checkpoint.open(path)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def _register(module: Any) -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .modeling.configuration_regraft import RegraftConfig
    from .modeling.modeling_regraft import RegraftForCausalLM

    AutoConfig.register("regraft", RegraftConfig, exist_ok=True)
    module.AutoModelForCausalLM.register(RegraftConfig, RegraftForCausalLM, exist_ok=True)


wrapt.register_post_import_hook(_register, "transformers.models.auto.modeling_auto")
