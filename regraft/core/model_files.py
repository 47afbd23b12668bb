"""What the files of a model directory hold, compared with the table of its family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io import safetensors
from ..io.files import check_inside, read_json
from .anatomy import Anatomy, Config, Key, PlacedPart
from .lazy import LazyTensor, Provenance
from .sentence_transformers import read_modules
from .side_files import SIDE_FILES

FILE_ARGUMENTS = ("vocab", "merges")  # of tokenizers' classes; a text there is a file's path
JSON_FILES = ("config.json", "lineage.json", safetensors.INDEX)
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

    RegraftError when there is none, the model is quantised, or the config asks for code.
    """
    if not (folder / "config.json").is_file():
        read_modules(folder)  # of sentence-transformers: says where the transformer lies
        raise RegraftError(
            f"no config.json in '{folder}': give a Hugging Face model directory or a GGUF file"
        )
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise RegraftError(
            f"'{folder}' is quantised ({config['quantization_config']}): dequantise it first"
        )
    refuse_fetched_code(config, folder)
    return config


def read_model_entries(
    folder: Path, anatomy: Anatomy, allow_nonfinite: bool = False
) -> dict[str, safetensors.TensorEntry]:
    """Tensors of a directory by their names in the state dict; see `Checkpoint.open`."""
    entries: dict[str, safetensors.TensorEntry] = {}
    for name, entry in safetensors.read_entries(folder).items():
        canonical = anatomy.canonical_name(name)
        if canonical in entries:
            raise RegraftError(
                f"'{folder}' holds '{canonical}' under two names, '{name}' too: remove one"
            )
        entries[canonical] = replace(entry, allow_nonfinite=allow_nonfinite)
    return entries


def find_unclaimed(
    entries: Mapping[str, safetensors.TensorEntry],
    placed: Mapping[Key, PlacedPart],
    anatomy: Anatomy,
    config: Config,
) -> dict[str, str]:
    """Tensors of the files that no part claims, with the reasons why they may be dropped.

    RegraftError for a tensor without such a reason.
    """
    # What a wrong table or a foreign file leaves over must not get lost silently.
    dropped: dict[str, str] = {}
    for name in sorted(set(entries) - {parameter.name for parameter in placed.values()}):
        reason = anatomy.reason_to_drop(name, config)
        if reason is None:
            raise RegraftError(
                f"{anatomy.family} anatomy has no part for parameter '{name}' "
                f"{list(entries[name].shape)}: add it to regraft/families/{anatomy.family}.py, "
                "or check that config.json belongs to these weights"
            )
        dropped[name] = reason

    return dropped


def open_tensor(
    entries: Mapping[str, safetensors.TensorEntry],
    parameter: PlacedPart,
    folder: Path,
    provenances: Mapping[str, Provenance],
) -> LazyTensor:
    """The lazy tensor of a placed part; RegraftError when it is missing or has another shape."""
    entry = entries.get(parameter.name)
    if entry is None:
        raise RegraftError(
            f"'{folder}' lacks tensor '{parameter.name}' of shape {list(parameter.shape)}: "
            "fetch the model again"
        )
    if entry.shape != parameter.shape:
        raise RegraftError(
            f"tensor '{parameter.name}' in '{entry.file}' has shape {list(entry.shape)}, "
            f"expected {list(parameter.shape)} ({parameter.part.signature}): "
            "config.json and weights do not belong together"
        )

    provenance = provenances.get(parameter.name, Provenance("copied", (parameter.name,)))
    return LazyTensor(parameter.shape, entry.torch_dtype(), provenance, entry.read)
