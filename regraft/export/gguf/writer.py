"""Writes a GGUF file, tensor by tensor, and quantises one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import RegraftError
from .tensors import GGUFTensor

if TYPE_CHECKING:
    import numpy as np

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# `general.file_type` by the kind of most tensors.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
# What llama.cpp wants in float32: vectors, and these.
WIDE = (
    "position_embd.weight",
    "ffn_gate_inp.weight",
    "conv1d.weight",
    "ssm_a",
    "ssm_d",
    "ssm_norm.weight",
    *(f"time_mix_{name}.weight" for name in ("w1", "w2", "decay_w1", "decay_w2", "lerp_fused")),
)


def import_gguf() -> Any:
    """The package gguf; RegraftError when it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise RegraftError(
            f"writing GGUF files needs the package gguf ({error}): pip install 'regraft[gguf]'"
        ) from error
    return gguf


def choose_kind(tensor: GGUFTensor, kind: str | None) -> str:
    """The type that a tensor is stored as.

    Args:
        tensor: that is stored.
        kind: of matrices, such as "Q8_0"; None: the model's own dtype.
    """
    if len(tensor.shape) < 2 or tensor.name.endswith(WIDE):
        return "F32"
    own = DTYPES.get(tensor.dtype, "F32")
    if kind is None:
        return own
    block = import_gguf().GGML_QUANT_SIZES[import_gguf().GGMLQuantizationType[kind]][0]
    # Rows that are no whole blocks stay short floats, as llama.cpp's converter leaves them.
    return kind if tensor.shape[-1] % block == 0 else "F16"


def encode(value: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A tensor's bytes or numbers of a type."""
    gguf = import_gguf()
    numbers = value.detach().float().contiguous().numpy()
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])
    return encoded


def write_file(
    file: Path,
    architecture: str,
    name: str,
    metadata: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    tensors: Sequence[GGUFTensor],
    kind: str | None = None,
) -> None:
    """Write a GGUF file; one tensor at a time is in memory.

    Args:
        file: to write.
        architecture: llama.cpp's name.
        name: of the model.
        metadata: keys without the architecture's prefix.
        vocabulary: whole keys of the tokenizer.
        tensors: of the model.
        kind: type of matrices, such as "Q8_0"; None: the model's own dtype.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, architecture)
    kinds = [choose_kind(tensor, kind) for tensor in tensors]
    matrices = [one for one, tensor in zip(kinds, tensors, strict=True) if len(tensor.shape) > 1]
    most = kind or max(sorted(set(matrices)), key=matrices.count)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        add_value(writer, f"{architecture}.{key}", value)
    for key, value in vocabulary.items():
        add_value(writer, key, value)

    with closing(writer):  # also where a tensor cannot be read
        for tensor, one in zip(tensors, kinds, strict=True):
            add_header(writer, tensor, one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, one in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(encode(tensor.read(), one))


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add one entry of the metadata, of the type that llama.cpp reads."""
    if isinstance(value, list | bytes):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def add_header(writer: Any, tensor: GGUFTensor, kind: str) -> None:
    """Add a tensor's name, shape, type and size."""
    gguf = import_gguf()
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    total = math.prod(tensor.shape) // block * size
    dtype = torch.zeros(0).numpy().dtype  # only for plain types, which `raw_dtype` says here
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, total, raw_dtype=number)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by name, in float32."""
    gguf = import_gguf()
    return {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        for one in gguf.GGUFReader(file).tensors
    }
