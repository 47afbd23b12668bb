"""Weights that are no plain model's, named as what they are: wrapped, adapters, quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import RegraftError
from ..io.foreign_weights import quote_folder
from ..io.safetensors import TensorEntry

# Part of a name that a wrapper puts there -> what writes it. Those that begin with an underscore
# may stand anywhere in a name, the others at its beginning.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "PyTorch's activation checkpointing",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel or DeepSpeed",
}
LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
# The end of a tensor's name -> the scheme of quantisation that it tells.
SCHEMES = {
    r"\.(qweight|qzeros)": "GPTQ or AWQ",
    r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)": (
        "bitsandbytes in 4 bits"
    ),
    r"\.(SCB|weight_format)": "bitsandbytes in 8 bits",
    r"\.weight_scale_inv": "fp8 in blocks",
    r"\.(weight_packed|weight_scale|input_scale)": "compressed-tensors, or fp8 or int8 with scales",
    r"_(blocks|scales)": "MXFP4",
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
            f"'{folder}' holds '{lora}', an adapter that is not merged: save the adapter "
            "alone with PEFT, then give the model that it was trained on and --adapter DIR"
        )
    for ending, scheme in SCHEMES.items():
        name = next((name for name in entries if re.search(f"{ending}$", name)), None)
        if name is not None:
            raise RegraftError(
                f"'{folder}' holds '{name}', as {scheme} does, and its config.json does not say how"
                " it is quantised: put its quantization_config back as it was published, or take "
                "the model that it was made from"
            )
    if mark := find_wrapper(entries):
        raise RegraftError(
            f"'{folder}' has names with '{mark}', which {WRAPPERS[mark]} puts there: strip it with "
            + format_stripping(folder, mark)
        )


def find_wrapper(names: Iterable[str]) -> str | None:
    """What a wrapper has put into names of tensors; None where none has."""
    names = list(names)
    for mark in WRAPPERS:
        anywhere = mark.startswith("_") and any(mark in name for name in names)
        if anywhere or (names and all(name.startswith(mark) for name in names)):
            return mark
    return None


def format_stripping(folder: Path, mark: str) -> str:
    """The command that takes a wrapper's mark out of all names in a directory."""
    quoted = quote_folder(folder)
    anywhere = mark.startswith("_")
    tensor_name = f"k.replace('{mark}', '')" if anywhere else f"k.removeprefix('{mark}')"
    # In an index a name stands behind a quotation mark, chr(34).
    in_index = f"'{mark}', ''" if anywhere else f"chr(34) + '{mark}', chr(34)"
    return (
        'python -c "from pathlib import Path; from safetensors.torch import load, save_file; '
        f"[save_file({{{tensor_name}: v for k, v in load(f.read_bytes()).items()}}, f, "
        f"{{'format': 'pt'}}) for f in Path({quoted}).glob('*.safetensors')]; "
        f"[f.write_text(f.read_text().replace({in_index})) "
        f"for f in Path({quoted}).glob('*.index.json')]\""
    )
