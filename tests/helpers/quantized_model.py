"""A llama in bfloat16 with some of its maps quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# Maps that are quantised: of both shapes, (outputs, inputs).
NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
# Stored tensors by name, and what the weight is afterwards.
Encoded = tuple[dict[str, Tensor], Tensor]


def save_llama(folder: Path) -> Path:
    """A llama in bfloat16 whose sizes are those that schemes can pack."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize(
    plain: Path, out: Path, settings: dict[str, Any], encode: Callable[[str, Tensor], Encoded]
) -> dict[str, Tensor]:
    """Write a model with some maps quantised; what they are afterwards, by name."""
    shutil.copytree(plain, out)
    values = load_file(plain / "model.safetensors")
    expected = {}
    for name in NAMES:
        pieces, expected[name] = encode(name, values.pop(name).float())
        values |= pieces
    contiguous = {name: value.contiguous() for name, value in values.items()}
    save_file(contiguous, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config))
    return expected
