"""Folders without weights that regraft reads, named as what they are."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RegraftError

ADAPTER = "adapter_config.json"
# Names of folders that a command may hold as they are.
PLAIN = re.compile(r"[\w./~+=@:, -]+")
# Pattern of a file -> what writes such files, and what to do.
FORMATS = {
    "adapter_model.*": ("an adapter without its adapter_config.json", "fetch that, then merge"),
    "consolidated*.safetensors": (
        "in Mistral's own format",
        "fetch the Hugging Face files of the model (config.json, model*.safetensors)",
    ),
    "consolidated*.pth": (
        "in Meta's own format",
        "convert it with transformers' convert_llama_weights_to_hf.py",
    ),
    "tf_model.h5": (
        "TensorFlow's",
        "fetch the safetensors, or save them with transformers 4 (from_pretrained(.., from_tf=True)"
        ".save_pretrained)",
    ),
    "flax_model*.msgpack": (
        "Flax's",
        "fetch the safetensors, or save them with transformers 4 (from_pretrained(.., "
        "from_flax=True).save_pretrained)",
    ),
    "*.onnx": ("ONNX's", "fetch the safetensors that it was exported from"),
    "onnx/*.onnx": ("ONNX's", "fetch the safetensors that it was exported from"),
    "model-*-of-*.safetensors": (
        "a shard without its index",
        "fetch model.safetensors.index.json beside it",
    ),
}


def check_foreign_folder(folder: Path) -> None:
    """RegraftError for an adapter, with or without the model that it belongs to, and for a folder
    with nothing of a Hugging Face model.
    """
    if (folder / ADAPTER).is_file():
        raise RegraftError(
            f"'{folder}' is an adapter (it has {ADAPTER}), not a whole model: "
            + advise_merging(folder)
        )
    is_empty = not (folder / "config.json").exists() and not any(folder.glob("model.safetensors*"))
    if is_empty and (problem := find_foreign_format(folder)):
        raise RegraftError(problem)


def find_foreign_format(folder: Path) -> str | None:
    """What a file of weights is that is not read, and what to do; None without such a file."""
    for pattern, (what, remedy) in FORMATS.items():
        if files := sorted(folder.glob(pattern)):
            return f"'{files[0]}' is {what}, which is not read: {remedy}"
    return None


def advise_merging(folder: Path) -> str:
    """What to do about an adapter."""
    return (
        "give the model that it was trained on, and --adapter "
        f"{quote_folder(folder)}; `regraft convert BASE OUT --adapter DIR` writes the merged model"
    )


def quote_folder(folder: Path, ending: str = "") -> str:
    """A folder's name in a command that a user may run; DIR for one that a shell would act on.

    Args:
        folder: the folder.
        ending: of the name of another folder beside it.
    """
    name = str(folder) if PLAIN.fullmatch(str(folder)) else "DIR"
    return f"'{name}{ending}'"


def explain_missing_weights(folder: Path, wanted: str) -> RegraftError:
    """The error for a folder without the weights that were wanted.

    Args:
        folder: without them.
        wanted: names of the files.
    """
    # Unpickling may run any code; PyTorch's reader of tensors alone does not, and is asked for.
    for pattern in ("*.bin", "*.pt"):
        if pickles := sorted(folder.glob(pattern)):
            if not pickles[0].name.startswith("pytorch_model"):
                return RegraftError(
                    f"'{pickles[0]}' is a pickle under a name that is not a model's: if it is a "
                    "state dict, call it pytorch_model.bin, then `regraft convert`"
                )
            return RegraftError(
                f"'{pickles[0]}' is a pickle, which is loaded by one command alone: "
                f"`regraft convert {quote_folder(folder)} OUT` takes its tensors and runs nothing"
            )
    nothing = f"no {wanted} in '{folder}': give a Hugging Face model directory or a GGUF file"
    return RegraftError(find_foreign_format(folder) or nothing)
