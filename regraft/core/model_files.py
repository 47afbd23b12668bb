"""What the files of a model directory hold, compared with the table of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io import safetensors
from ..io.files import read_json
from .anatomy import Anatomy, Config, Key, PlacedPart
from .lazy import LazyTensor, Provenance


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a directory; RegraftError when there is none, or the model is quantised."""
    if not (folder / "config.json").is_file():
        raise RegraftError(
            f"no config.json in '{folder}': give a Hugging Face model directory or a GGUF file"
        )
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise RegraftError(
            f"'{folder}' is quantised ({config['quantization_config']}): dequantise it first"
        )
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
