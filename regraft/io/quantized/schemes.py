"""Which scheme of quantisation a model has, and its tensors as plain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import RegraftError
from ..safetensors import DTYPES, TensorEntry
from . import bitsandbytes, compressed_tensors, fp8, gptq, mxfp4, torchao
from .entry import Found

# `quant_method` of config.json -> what claims the pieces of its tensors.
SCHEMES: dict[str, Callable[[Found], None]] = {
    "fp8": fp8.claim,
    "fbgemm_fp8": fp8.claim,
    "mxfp4": mxfp4.claim,
    "gptq": gptq.claim_gptq,
    "awq": gptq.claim_awq,
    "bitsandbytes": bitsandbytes.claim,
    "compressed-tensors": compressed_tensors.claim,
    "torchao": torchao.claim,
}
# Names of dtypes in config.json -> as safetensors writes them.
NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def find_method(quantization: Mapping[str, Any], folder: Path) -> str:
    """The scheme that a `quantization_config` names; RegraftError when it is not read.

    Args:
        quantization: the content of the key.
        folder: of the model, for errors.
    """
    method = quantization.get("quant_method")
    if method is None and quantization.keys() & {"load_in_4bit", "load_in_8bit"}:
        method = "bitsandbytes"  # older configs
    if method not in SCHEMES:
        raise RegraftError(
            f"'{folder}' is quantised by {str(method)[:40]!r}, which is not read (read are "
            f"{', '.join(SCHEMES)} and GGUF): take the model that it was made from"
        )
    return str(method)


def dequantize(
    entries: Mapping[str, TensorEntry],
    quantization: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(a quantised model's tensors as plain ones by name, stored tensors not used -> why).

    Args:
        entries: what the files hold.
        quantization: `quantization_config` of the model.
        config: the rest of its config.json.
        folder: of the model, for errors.

    RegraftError for a scheme that is not read, and where tensors are missing.
    """
    method = find_method(quantization, folder)
    found = Found(dict(entries), quantization, choose_dtype(entries, config))
    SCHEMES[method](found)
    return found.entries | found.computed, found.dropped


def describe_step(quantization: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The step in a model's history; see `find_method`."""
    return {"step": "Dequantize", "arguments": {"method": find_method(quantization, folder)}}


def choose_dtype(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> str:
    """The dtype before quantisation: of the config, or of the tensors that are plain."""
    said = NAMES.get(str(config.get("dtype") or config.get("torch_dtype")))
    plain = Counter(one.dtype for one in entries.values() if one.dtype in DTYPES)
    return said or (plain.most_common(1)[0][0] if plain else "BF16")
