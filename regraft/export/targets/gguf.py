"""GGUF files for llama.cpp: a stock model as it is, a linearized one through a stock class."""

from __future__ import annotations

from ...core.anatomy import Config, find_anatomy
from ...core.checkpoint import Checkpoint
from ..gguf import fit
from ..gguf.model import GGUFModel
from ..target import STOCK, ExportTarget, find_target


def list_forms(config: Config) -> dict[str, list[str]]:
    """Targets whose result may be written as GGUF, in order -> what does not fit, there or in
    llama.cpp.
    """
    anatomy = find_anatomy(config)
    is_stock = anatomy.host(config) is anatomy
    forms = {"hf": fit.find_misfits(config)} if is_stock else {}
    for name in STOCK:
        target = find_target(name)
        misfits = target.find_misfits(config)
        forms[name] = misfits or fit.find_misfits(target.build_config(config))
    return forms


def find_misfits(config: Config) -> list[str]:
    """What does not fit in the first form; nothing when some form fits."""
    forms = list_forms(config)
    return next(iter(forms.values())) if all(forms.values()) else []


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model in the stock class that is written as GGUF."""
    forms = list_forms(checkpoint.config)
    name = next(name for name, misfits in forms.items() if not misfits)
    return find_target(name).convert(checkpoint)


target = ExportTarget(
    name="gguf",
    loads="llama.cpp, such as llama-server -m OUT/FILE.gguf",
    find_misfits=find_misfits,
    convert=convert,
    prepare=GGUFModel.of,
)
