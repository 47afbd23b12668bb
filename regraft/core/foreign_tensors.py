"""Weights that are no plain model's, named as what they are: wrapped, adapters, quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import RegraftError
from ..io.foreign_weights import MERGE
from ..io.safetensors import TensorEntry

# Part of a name that a wrapper puts there -> what writes it. Those with underscores may stand
# anywhere in a name, the others at its beginning.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "PyTorch's activation checkpointing",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel or DeepSpeed",
}
LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
# What tells a scheme of quantisation: the end of a tensor's name.
SCHEMES = {
    r"\.(qweight|qzeros)": "GPTQ or AWQ",
    r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)": (
        "bitsandbytes in 4 bits"
    ),
    r"\.(SCB|weight_format)": "bitsandbytes in 8 bits",
    r"\.weight_scale_inv": "fp8 in blocks",
    r"\.weight_packed": "compressed-tensors",
    r"\.(weight_scale|input_scale)": "fp8 or int8 with scales",
    r"(_blocks|_scales)": "MXFP4",
    r"\.W_q": "HQQ",
}


def check_foreign_tensors(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """RegraftError when tensors that do not fit a model are those of a wrapper or an adapter, or
    are quantised.

    Args:
        folder: that was opened.
        entries: its tensors by name.
    """
    if lora := next(filter(LORA.search, entries), None):
        raise RegraftError(
            f"'{folder}' holds '{lora}', an adapter that is not merged: "
            + MERGE.format(folder=folder)
        )
    for ending, scheme in SCHEMES.items():
        name = next((name for name in entries if re.search(f"{ending}$", name)), None)
        if name is not None:
            raise RegraftError(
                f"'{folder}' is quantised ({scheme}: it holds '{name}'), though config.json has no "
                f"quantization_config: {describe_dequantizing(folder)}"
            )
    if found := find_wrapper(entries):
        raise RegraftError(
            f"'{folder}' has names with '{found}', which {WRAPPERS[found]} puts there: strip it: "
            + describe_stripping(folder, found)
        )


def find_wrapper(names: Iterable[str]) -> str | None:
    """What a wrapper has put into names of tensors; None where none has."""
    names = list(names)
    for mark in WRAPPERS:
        anywhere = mark.startswith("_") and any(mark in name for name in names)
        if anywhere or (names and all(name.startswith(mark) for name in names)):
            return mark
    return None


def describe_stripping(folder: Path, mark: str) -> str:
    """The command that takes a wrapper's mark out of the names in a directory."""
    inner = f"replace('{mark}', '')" if mark.startswith("_") else f"removeprefix('{mark}')"
    return (
        'python -c "from pathlib import Path; from safetensors.torch import load, save_file; '
        f"[save_file({{k.{inner}: v for k, v in load(f.read_bytes()).items()}}, f, "
        f"{{'format': 'pt'}}) for f in Path('{folder}').glob('*.safetensors')]; "
        f"[f.write_text(f.read_text().replace('{mark}', '')) "
        f"for f in Path('{folder}').glob('*.index.json')]\""
    )


def describe_dequantizing(folder: Path) -> str:
    """What to do about a quantised model."""
    return (
        "take the model it was made from, or put the key back and run "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').dequantize().save_pretrained('{folder}-plain')\""
    )
