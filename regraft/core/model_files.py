"""The files of a model directory beside its weights: config, tokenizer, what travels with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io import output
from ..io.files import check_inside, read_json
from .sentence_transformers import read_modules
from .side_files import SIDE_FILES

FILE_ARGUMENTS = ("vocab", "merges")  # of tokenizers' classes; a text there is a file's path
JSON_FILES = ("config.json", "lineage.json", "model.safetensors.index*.json")
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def check_model_files(folder: Path) -> None:
    """RegraftError when a file beside the weights is no regular file or lies elsewhere.

    Called before anything is opened: to open a named pipe takes for ever.
    """
    patterns = (*SIDE_FILES, *JSON_FILES)
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        if not file.is_dir():
            check_inside(folder, file)


def refuse_fetched_code(config: Any, origin: object) -> None:
    """RegraftError when a config asks for kernels from a repository, which would be run.

    Args:
        config: the content of a config.json, or a part of it.
        origin: where it is from, for the error.
    """
    if isinstance(config, list):
        for part in config:
            refuse_fetched_code(part, origin)
    for key, value in config.items() if isinstance(config, dict) else ():
        if IMPLEMENTATION.fullmatch(str(key)) and "/" in str(value):
            raise RegraftError(
                f"config of '{origin}' has {key} {value!r:.60}, code that would be fetched and "
                "run: remove the key"
            )
        refuse_fetched_code(value, origin)


def check_tokenizer_config(folder: Path) -> None:
    """RegraftError when tokenizer_config.json names files outside of its directory."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    named = {key: config[key] for key in config if key.endswith("_file") or key in FILE_ARGUMENTS}
    inputs = config.get("init_inputs")
    if isinstance(inputs, list):
        named |= {f"init_inputs.{number}": value for number, value in enumerate(inputs)}
    for key, value in named.items():
        # Paths of the machine where it was saved are common and lead nowhere here.
        if isinstance(value, str) and len(value) < 4096 and Path(value).is_file():
            try:
                check_inside(folder, Path(value))
            except RegraftError as error:
                raise RegraftError(f"'{file}' has {key} {value!r}: {error}") from error


def find_tokenizer_code(folder: Path) -> str:
    """The class of its own that a tokenizer would be loaded with, empty when it names none."""
    file = folder / "tokenizer_config.json"
    classes = read_json(file).get("auto_map") if file.is_file() else None
    if isinstance(classes, dict):
        classes = classes.get("AutoTokenizer")
    if isinstance(classes, list):
        classes = next((name for name in reversed(classes) if name), None)
    return classes if isinstance(classes, str) else ""


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a directory.

    RegraftError when there is none, or the config asks for code.
    """
    if not (folder / "config.json").is_file():
        read_modules(folder)  # of sentence-transformers: says where the transformer lies
        if (marker := output.read_marker(folder)) and not marker.complete:
            raise RegraftError(
                f"'{folder}' is not finished: run the command that writes it again, it goes on"
            )
        raise RegraftError(
            f"no config.json in '{folder}': give a Hugging Face model directory or a GGUF file"
        )
    config = read_json(folder / "config.json")
    if not config.get("quantization_config"):
        # Null or empty: it is not quantised, but transformers stumbles over the key.
        config.pop("quantization_config", None)
    refuse_fetched_code(config, folder)
    return config
