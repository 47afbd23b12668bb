"""GGUF files: the header for planning, one conversion to a Hugging Face directory in a cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import RegraftError
from . import shard_writer
from .files import read_json, sha256, write_json

STEP = {"step": "FromGGUF", "arguments": {}}
log = logging.getLogger("regraft")


def find_gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one of a directory; None for one with
    config.json.
    """
    if path.is_file():
        with open(path, "rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise RegraftError(
                f"'{path}' is not a GGUF file (starts with {magic!r}): give one, or a model"
                " directory"
            )
        return path
    if (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise RegraftError(
            f"'{path}' holds {len(files)} GGUF files: name one, such as '{files[0]}'"
        )
    return find_gguf_file(files[0]) if files else None


def cache_folder() -> Path:
    """The cache folder: REGRAFT_CACHE, or ~/.cache/regraft."""
    return Path(os.environ.get("REGRAFT_CACHE") or Path.home() / ".cache" / "regraft")


def find_converted(file: Path) -> Path | None:
    """The converted directory of a GGUF file when there is one already."""
    folder = cache_folder() / "gguf" / sha256(file)
    return folder if (folder / "config.json").is_file() else None


def read_config(file: Path) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file, from its header."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        header = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the readers raise anything on a damaged header
        raise RegraftError(
            f"cannot read the header of '{file}' ({_format_error(error)}): fetch the file again"
        ) from error
    found: dict[str, Any] = {
        key: value for key, value in header.to_dict().items() if key != "quantization_config"
    }
    if not found.get("architectures") and type(header) in AutoModelForCausalLM._model_mapping:
        found["architectures"] = [
            AutoModelForCausalLM._model_mapping[type(header)].__name__
        ]  # what it is loaded as
    return found


def check_size(file: Path, parameters: int) -> None:
    """RegraftError when a GGUF file is cut short or does not hold as many numbers as the model has
    parameters.
    """
    reader = _open_reader(file)
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    spare = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if tensor.name in ("output.weight", "rope_freqs.weight")
    )
    if not held - spare <= parameters <= held:
        raise RegraftError(
            f"'{file}' holds {held} numbers where its config needs {parameters}: the family is not"
            " supported"
        )


def _open_reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RegraftError(
            f"reading '{file}' needs the package gguf: pip install 'regraft[gguf]'"
        ) from error
    try:
        return GGUFReader(file)
    except (
        Exception
    ) as error:  # the reader raises ValueError, KeyError, IndexError, ... on a damaged file
        raise RegraftError(
            f"'{file}' is cut short or damaged ({_format_error(error)}): fetch the file again"
        ) from error


def convert_once(file: Path) -> Path:
    """Convert a GGUF file once to float32 safetensors in the cache (about 20 s for 135 M
    parameters); the directory.

    Another process that converts the same file is waited for.
    """
    if folder := find_converted(file):
        return folder
    _open_reader(file)
    folder = cache_folder() / "gguf" / sha256(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        return find_converted(file) or _write_converted(file, folder)


def _write_converted(file: Path, folder: Path) -> Path:
    """The converted directory, made anew."""
    log.info("converting %s once, into %s", file, folder)
    with shard_writer.new_directory(folder, overwrite=True) as partial:
        try:
            _convert(file, partial.path)
        except OSError:
            raise
        except Exception as error:  # whatever the loader raises on weights it cannot dequantise
            raise RegraftError(
                f"cannot convert '{file}' ({_format_error(error)}): fetch it again or convert it"
                " elsewhere"
            ) from error
        _write_lineage(file, partial.path)
    return folder


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dequantise = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, quantization_config=dequantise
    )
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)


def _write_lineage(file: Path, folder: Path) -> None:
    family = read_json(folder / "config.json")["model_type"]
    digest = sha256(file)
    source = {
        "path": str(file.resolve()),
        "family": family,
        "files": {file.name: digest},
        "sha256": digest,
    }
    written = sorted(folder.glob("*.safetensors")) + [folder / "config.json"]
    hashes = {path.name: sha256(path) for path in written}
    write_json(folder / "lineage.json", {"source": source, "steps": [STEP], "files": hashes})


def _format_error(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:200]
