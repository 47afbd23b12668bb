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
    """What does not fit in the nearest form: the first whose class holds the model, else the first
    of all. Nothing when some form fits.
    """
    forms = list_forms(config)
    if not all(forms.values()):
        return []
    held = [forms[name] for name in forms if not find_target(name).find_misfits(config)]
    return [*held, *forms.values()][0]


def find_form(config: Config) -> ExportTarget:
    """The first target that a model which fits may be written through."""
    forms = list_forms(config)
    return find_target(next(name for name, misfits in forms.items() if not misfits))


def build_config(config: Config) -> Config:
    """config.json of the stock class that is written as GGUF."""
    return find_form(config).build_config(config)


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model in the stock class that is written as GGUF."""
    return find_form(checkpoint.config).convert(checkpoint)


target = ExportTarget(
    name="gguf",
    loads="llama.cpp, such as llama-server -m OUT/FILE.gguf",
    find_misfits=find_misfits,
    convert=convert,
    build_config=build_config,
    prepare=GGUFModel.of,
)
