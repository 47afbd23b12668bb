"""GGUF files: headers for planning, and a conversion to a Hugging Face directory in a cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import RegraftError, explain_errors, first_line
from . import shard_writer
from .files import read_json, sha256, write_json
from .gguf_header import check_header

STEP: dict[str, Any] = {"step": "FromGGUF", "arguments": {}}  # in the history of a model
log = logging.getLogger("regraft")


def find_gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory.

    None for a directory with config.json, or without GGUF files. RegraftError for a file of another
    format, or a directory with several.
    """
    if path.is_file():
        with open(path, "rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise RegraftError(
                f"'{path}' is not a GGUF file (starts with {magic!r}): "
                "give one, or a model directory"
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
    """The cache folder: $REGRAFT_CACHE, or ~/.cache/regraft."""
    return Path(os.environ.get("REGRAFT_CACHE") or Path.home() / ".cache" / "regraft")


def find_converted(file: Path) -> Path | None:
    """The directory that a GGUF file was converted to; None when it was not yet."""
    folder = cache_folder() / "gguf" / sha256(file)
    return folder if (folder / "config.json").is_file() else None


def read_config(file: Path) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file, from its header.

    RegraftError when transformers cannot read the header.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_header(file)
    with explain_errors(f"cannot read the header of '{file}'", "fetch the file again"):
        header = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )

    # Without quantisation: the conversion writes plain float32.
    config: dict[str, Any] = {
        key: value for key, value in header.to_dict().items() if key != "quantization_config"
    }
    if not config.get("architectures") and type(header) in AutoModelForCausalLM._model_mapping:
        # The class that loads it, which the converted directory will name too.
        config["architectures"] = [AutoModelForCausalLM._model_mapping[type(header)].__name__]
    return config


def check_size(file: Path, parameters: int) -> None:
    """Check that a GGUF file holds as many numbers as its config needs.

    Args:
        file: the GGUF file.
        parameters: the number of parameters of the model that its config describes.

    RegraftError when it does not, or when it is cut short.
    """
    reader = _open_reader(file)
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)

    # Tensors that the model need not have: a head that is tied, and tables of rotary factors.
    spare = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if tensor.name in ("output.weight", "rope_freqs.weight")
    )
    if not stored - spare <= parameters <= stored:
        raise RegraftError(
            f"'{file}' holds {stored} numbers where its config needs {parameters}: "
            "the family is not supported"
        )


def _open_reader(file: Path) -> Any:
    """A `gguf.GGUFReader`; RegraftError when the file is damaged or the package is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RegraftError(
            f"reading '{file}' needs the package gguf: pip install 'regraft[gguf]'"
        ) from error
    check_header(file)
    with explain_errors(f"'{file}' is cut short or damaged", "fetch the file again"):
        return GGUFReader(file)


def convert_once(file: Path) -> Path:
    """The directory of a GGUF file in the cache, converted to float32 at the first call.

    The conversion takes about 20 s for 135 M parameters. When another process converts the same
    file, this waits for it. RegraftError when the file is damaged or cannot be dequantised.
    """
    if folder := find_converted(file):
        return folder

    _open_reader(file)  # a damaged file is refused before anything is written
    folder = cache_folder() / "gguf" / sha256(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        return find_converted(file) or _write_converted(file, folder)


def _write_converted(file: Path, folder: Path) -> Path:
    """Convert a GGUF file into `folder`, whole or not at all; returns `folder`."""
    log.info("converting %s once, into %s", file, folder)
    with shard_writer.new_directory(folder, overwrite=True) as partial:
        try:
            _convert(file, partial.path)
        except OSError:
            raise  # `new_directory` explains a full disk
        except Exception as error:  # whatever the loader raises on weights it cannot dequantise
            raise RegraftError(
                f"cannot convert '{file}' ({first_line(error)}): "
                "fetch it again or convert it elsewhere"
            ) from error
        _write_lineage(file, partial.path)
    return folder


def _convert(file: Path, target: Path) -> None:
    """Load a GGUF file with transformers, dequantised, and save model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dequantise = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=dequantise, trust_remote_code=False
    )
    model.config.__dict__.pop("quantization_config", None)  # else it is saved as quantised
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    tokenizer.save_pretrained(target)


def _write_lineage(file: Path, folder: Path) -> None:
    """Write lineage.json, which names the GGUF file as the source."""
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
