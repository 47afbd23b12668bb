"""Tiny random models of every family, with nothing hidden by ones and zeros."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gpt_neox": "GPTNeoXConfig",
    "gpt2": "GPT2Config",
}


def sizes_of(
    family: str, hidden: int, heads: int, kv: int, dim: int, ffn: int, layers: int, vocab: int
) -> dict[str, Any]:
    """Config keys; families without a head_dim of their own get hidden = heads * dim."""
    if family == "gpt2":
        return {
            "n_embd": heads * dim,
            "n_head": heads,
            "n_inner": ffn,
            "n_layer": layers,
            "n_positions": 512,
            "vocab_size": vocab,
        }
    common = {"num_attention_heads": heads, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    if family == "gpt_neox":
        return common | {"hidden_size": heads * dim}
    return common | {"hidden_size": hidden, "num_key_value_heads": kv, "head_dim": dim}


def tiny(
    family: str,
    *,
    hidden: int = 36,
    heads: int = 9,
    kv: int = 3,
    dim: int = 8,
    ffn: int = 52,
    layers: int = 3,
    vocab: int = 97,
    seed: int = 0,
    **keys: Any,
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """(config, model in eval mode, float32) of `family`: odd sizes by default, biases, gains and maps all perturbed.

    9 query heads over 3 key/value heads and heads * dim != hidden where the family allows it; gpt_neox and gpt2 get
    hidden = heads * dim. `keys` are further config keys, such as `tie_word_embeddings=True` or `attention_bias=True`.
    """
    torch.manual_seed(seed)
    sizes = sizes_of(family, hidden, heads, kv, dim, ffn, layers, vocab)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, CONFIGS[family])(**(sizes | special | keys))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                start = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(start + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)
    return config, model


def tokens(rows: int, length: int, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length), none of them special."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
