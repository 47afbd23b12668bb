"""A GGUF file read back: its tensors, and its logits where transformers reads the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from ...core.anatomy import Anatomy, Config, find_anatomy
from ...core.checkpoint import Checkpoint
from ...core.stock_config import read_stock_config
from ...errors import RegraftError
from ...io import gguf
from ...mixers.source_windows import source_windows
from ...modeling.meta import silence_transformers
from ..equality import BOUND
from .rotary import rope_of
from .tensors import GGUFTensor
from .writer import choose_kind, encode, import_gguf, read_tensors

QUANTIZED = 0.2  # of a tensor's root mean square: four bits take about 0.08


def read_all(file: Path, tensors: list[GGUFTensor]) -> dict[str, Tensor]:
    """A file's tensors in float32; RegraftError when it has others than were to be stored."""
    stored = read_tensors(file)
    if odd := sorted(set(stored) ^ {tensor.name for tensor in tensors}):
        raise RegraftError(f"'{file.name}' has other tensors, such as '{odd[0]}': report this")
    return stored


def compare_quantized(file: Path, tensors: list[GGUFTensor]) -> float:
    """How far the matrices of a file that llama.cpp quantised are off: the mean over them of the
    root mean square difference, as a share of the root mean square.

    RegraftError when a tensor is missing or is another one.
    """
    stored, errors = read_all(file, tensors), []
    for tensor in tensors:
        wanted = tensor.read().float().flatten()
        found = stored[tensor.name].flatten()
        error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
        if found.shape != wanted.shape or not error <= QUANTIZED:  # False for NaN
            raise RegraftError(
                f"'{tensor.name}' of '{file.name}' is off by {error:.1e} (bound {QUANTIZED:g}): "
                "nothing was published, report this"
            )
        errors += [error] if len(tensor.shape) > 1 else []
    return sum(errors) / len(errors)


def compare_tensors(file: Path, tensors: list[GGUFTensor], kind: str | None) -> None:
    """RegraftError when a file lacks a tensor, or has one that differs by a bit from how it was to
    be stored.
    """
    package, stored = import_gguf(), read_all(file, tensors)
    for tensor in tensors:
        one = choose_kind(tensor, kind)
        number = package.GGMLQuantizationType[one]
        wanted = torch.from_numpy(package.quants.dequantize(encode(tensor.read(), one), number))
        if not same(stored[tensor.name], wanted):
            raise RegraftError(f"'{tensor.name}' of '{file.name}' is damaged: report this")


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return torch.equal(left.reshape(-1), right.reshape(-1).float()) and left.numel() > 0


def is_read_alike(file: Path, checkpoint: Checkpoint) -> bool:
    """Whether transformers makes of a file's header the config that it was written from.

    It does not read every architecture, nor every key of those that it reads.
    """
    try:
        config = gguf.read_config(file)
        anatomy = find_anatomy(config)
        return describe(config, anatomy) == describe(checkpoint.config, checkpoint.anatomy)
    except (RegraftError, ValueError, KeyError, TypeError):
        return False


def describe(config: Config, anatomy: Anatomy) -> list[Any]:
    """What decides the logits of a stock model beside its weights."""
    sizes, stock = anatomy.solve(config), read_stock_config(config, anatomy)
    rope = {key: value for key, value in rope_of(stock).items() if value is not None}
    layers = [anatomy.attention(config, layer) for layer in range(sizes["depth"])]
    return [anatomy.family, sizes, rope, layers, source_windows(config)]


@torch.no_grad()
def compare_logits(file: Path, stock: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference of logits, as transformers loads a file, by the largest logit.

    Args:
        file: in float32.
        stock: what it was written from.
        ids: (1, time).
    """
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    with silence_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        ).eval()
    expected = stock(input_ids=ids, use_cache=False).logits
    found = loaded(input_ids=ids, use_cache=False).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= BOUND:  # False for NaN
        raise RegraftError(
            f"'{file.name}' as transformers loads it differs by {difference:.1e} of the largest"
            f" logit (bound {BOUND:g}): nothing was published, report this"
        )
    return difference
