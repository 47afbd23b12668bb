"""Classes in Python files beside a model's weights, which run only where the user says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RegraftError, explain_errors
from ..io.files import read_json

CONFIG = "AutoConfig"
# Auto classes that models are opened with, as `auto_map` names them.
MODELS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")


def run_custom_code(source: str | Path, trusted: bool) -> bool:
    """Whether a model has classes of its own and they may be run; then they are.

    Imports the classes that a model's config names in its own files and tells transformers of
    them, so that its Auto classes and the inference of tables find them by their `model_type`. They
    stay registered for the whole process, as with transformers' own `register`.

    Args:
        source: the model's directory; others have no such files.
        trusted: whether the user said that the files may be run; else nothing happens.

    RegraftError when a class cannot be imported.
    """
    folder = Path(source)
    if not trusted or not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    named = config.get("auto_map") or {}
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # Types of transformers, and regraft's, load with the installed classes.
    if CONFIG not in named or config.get("model_type") in (*CONFIG_MAPPING_NAMES, "regraft"):
        return False
    with explain_errors(f"the code beside '{folder}' does not run", "fix it"):
        kind = _import_class(named[CONFIG], folder)
        transformers.AutoConfig.register(kind.model_type, kind, exist_ok=True)
        for auto in (name for name in MODELS if name in named):
            model = _import_class(named[auto], folder)
            model.config_class = kind
            getattr(transformers, auto).register(kind, model, exist_ok=True)
    return True


def _import_class(reference: Any, folder: Path) -> Any:
    """A class of a file in a folder, "FILE.CLASS"."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not isinstance(reference, str) or "--" in reference:
        raise RegraftError(
            f"config.json of '{folder}' names {reference!r:.60}, code of another repository: fetch "
            "it beside the weights first"
        )
    return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)


def find_registered(name: str) -> Any:
    """The model class with a name that `run_custom_code` has registered; None without one."""
    import transformers

    for auto in MODELS:
        registered = getattr(transformers, auto)._model_mapping._extra_content
        for kind in registered.values():
            if kind.__name__ == name:
                return kind
    return None
