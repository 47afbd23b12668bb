"""Tiny models with tokenizers that llama.cpp has, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
)

from helpers.tiny import CHAT, SPECIAL, tiny

VOCAB = 272
# Classes of llama.cpp that want heads times head_dim to be hidden_size.
SQUARE: dict[str, dict[str, Any]] = {
    name: {"hidden": 72} for name in ("qwen2", "phi", "phi3", "olmo2", "starcoder2")
}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a token per byte and one merge."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    core = Tokenizer(BPE({word: row for row, word in enumerate(words)}, [("t", "h")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrap(core)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: bytes as a last resort, a space before the text."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*SPECIAL, *pieces, "\u2581", "a", "b", "c", "ab", "\u2581a", "abc", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "a"), ("ab", "c"), ("\u2581", "ab")]
    core = Tokenizer(BPE({word: row for row, word in enumerate(words)}, merges, byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return wrap(core)


def wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens and a chat template."""
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT
    )


def save_for_gguf(path: Path, family: str = "llama", **keys: Any) -> Path:
    """Write a tiny model and its tokenizer; returns the path."""
    tiny(family, vocab=VOCAB, **(SQUARE.get(family, {}) | keys))[1].save_pretrained(path)
    # transformers takes Phi-3's tokenizer for one of Llama's kind, whatever its files say.
    make = sentencepiece_tokenizer if family == "phi3" else byte_level_tokenizer
    make().save_pretrained(path)
    return path


TYPES = ["linear_attention", "full_attention", "linear_attention"]
HYBRID: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "layer_types": TYPES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN35: dict[str, Any] = {  # three heads of values for each of keys
    "num_attention_heads": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GRANITE: dict[str, Any] = {
    "shared_intermediate_size": 52,
    "num_attention_heads": 6,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 6,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_d_conv": 3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.4,
    "position_embedding_type": "rope",
}


def hybrid(family: str, **keys: Any) -> PreTrainedConfig:
    """The config of a tiny model with layers that have a state: "qwen3_5_text" or
    "granitemoehybrid".
    """
    if family == "qwen3_5_text":
        return Qwen3_5TextConfig(**(HYBRID | QWEN35 | keys))
    return GraniteMoeHybridConfig(**(HYBRID | GRANITE | keys))


@torch.no_grad()
def save_hybrid(path: Path, family: str, **keys: Any) -> Path:
    """Write such a model and its tokenizer; returns the path. Output biases are zero."""
    torch.manual_seed(0)
    config = hybrid(family, **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(5.0)
        elif not name.endswith("o_proj.bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path
