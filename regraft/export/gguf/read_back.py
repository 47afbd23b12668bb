"""A GGUF file read back: its tensors, and its logits where transformers reads the architecture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import RegraftError
from .tensors import GGUFTensor
from .writer import choose_kind, encode, import_gguf, read_tensors

# Architectures whose files transformers 5.24 loads as the class that regraft wrote them from. Of
# Gemma's files it does not take the factor on the scores.
LOADED = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "starcoder2")


def compare_tensors(file: Path, tensors: list[GGUFTensor], kind: str | None) -> int:
    """Check that a file holds every tensor as it was to be stored; how many there are.

    RegraftError when one is missing, or differs by a bit.
    """
    gguf, stored = import_gguf(), read_tensors(file)
    if set(stored) != {tensor.name for tensor in tensors}:
        odd = sorted(set(stored) ^ {tensor.name for tensor in tensors})
        raise RegraftError(f"'{file.name}' has other tensors, such as '{odd[0]}': report this")
    for tensor in tensors:
        one = choose_kind(tensor, kind)
        number = gguf.GGMLQuantizationType[one]
        wanted = torch.from_numpy(gguf.quants.dequantize(encode(tensor.read(), one), number))
        if not same(stored[tensor.name], wanted):
            raise RegraftError(f"'{tensor.name}' of '{file.name}' is damaged: report this")
    return len(tensors)


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return torch.equal(left.reshape(-1), right.reshape(-1).float()) and left.numel() > 0


@torch.no_grad()
def compare_logits(file: Path, stock: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference of logits, as transformers loads a file, by the largest logit."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from ...modeling.meta import silence_transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    with tempfile.TemporaryDirectory() as cache, silence_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            cache_dir=cache,
            **options,
        ).eval()
    expected = stock(input_ids=ids, use_cache=False).logits
    found = loaded(input_ids=ids, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())
