"""What a target of an export consists of, and how one is found by the name of its file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.anatomy import Config, find_anatomy
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, suggest
from .gguf.architecture import ENGINE

if TYPE_CHECKING:
    from .gguf.model import GGUFModel

VLLM = "0.32.0"  # release of vLLM that results are compared with


@dataclass(frozen=True)
class ExportTarget:
    """A form that a model can be exported in.

    Attributes:
        name: of its file in `export/targets`.
        loads: what opens the result.
        find_misfits: config of a model -> what of it the target cannot hold, a line each, with the
            keys or flags that matter. Nothing: it holds the model.
        convert: a model that fits, in the target's form.
        remix: fields of a `Remix` that makes models which fit.
        method: the method of `linearize` that trains them, where none is given.
        build_config: config of a model that fits -> config of the result.
        engines: what runs the result and from which release, as it was proven, a line each.
        code: whether the result needs `import regraft.modeling` or `trust_remote_code`.
        prepare: a converted model, ready to be written as GGUF files; None: the result is a
            directory that transformers loads.
    """

    name: str
    loads: str
    find_misfits: Callable[[Config], list[str]]
    convert: Callable[[Checkpoint], Checkpoint]
    remix: dict[str, Any] = field(default_factory=dict)
    method: str = "auto"
    build_config: Callable[[Config], Config] = lambda config: config
    engines: tuple[str, ...] = ()
    code: bool = False
    prepare: Callable[[Checkpoint], GGUFModel] | None = None

    def check_holds(self, checkpoint: Checkpoint) -> None:
        """RegraftError that says what of a model the target cannot hold."""
        if misfits := self.find_misfits(checkpoint.config):
            raise RegraftError(
                f"{self.name} cannot hold '{checkpoint.origin}': {'; '.join(misfits)}"
            )


def name_engines(kind: str, vllm: str = "", others: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`ExportTarget.engines` of a class that transformers, vLLM and llama.cpp have.

    Args:
        kind: name of the class.
        vllm: what has to be known of vLLM.
        others: further lines.
    """
    return (
        f"transformers 5.24 or newer (`{kind}`)",
        f"vLLM {VLLM} or newer{vllm}",
        f"llama.cpp, as of llama-cpp-python {ENGINE}, from the GGUF file"
        " (`regraft export --to gguf` writes one)",
        *others,
    )


# Targets with a class of transformers for linearized models, the preferred one first.
STOCK = ("granite_swa", "granite_hybrid", "qwen3_5")
ENGINE_ALONE = "rwkv6qwen2"  # what llama.cpp runs without a class of transformers


def find_served_target(config: Config) -> str:
    """The target that writes a model as a stock class: "hf" for one that is stock already, else the
    first of STOCK that holds it, else ENGINE_ALONE.

    RegraftError that says why none does.
    """
    anatomy = find_anatomy(config)
    if anatomy.host(config) is anatomy:
        return "hf"
    misfits = {name: find_target(name).find_misfits(config) for name in (*STOCK, ENGINE_ALONE)}
    for name, found in misfits.items():
        if not found:
            return name
    reasons = "; ".join(f"{name}: {found[0]}" for name, found in misfits.items())
    raise RegraftError(f"no engine runs this model ({reasons}): --to hf writes it with code")


def list_targets() -> list[str]:
    """Every target's name: the files of `export/targets`."""
    package = importlib.import_module("regraft.export.targets")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def find_target(name: str) -> ExportTarget:
    """The target with a name; RegraftError naming the known ones when there is none."""
    if name not in list_targets():
        hint = suggest(f"{name:.60}", list_targets())
        raise RegraftError(
            f"unknown target '{name:.60}': {hint}use one of {', '.join(list_targets())}"
        )
    target: ExportTarget = importlib.import_module(f"regraft.export.targets.{name}").target
    return target
