"""Tiny models with tokenizers that llama.cpp has, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

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
