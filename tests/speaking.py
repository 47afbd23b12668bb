"""A tiny random model on disk that can read and write: byte-level tokenizer, chat template, 400-odd tokens."""

from __future__ import annotations

from pathlib import Path

from models import tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 0 pad, 1 bos, 2 eos."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT
    )


def save(path: Path, family: str = "llama", layers: int = 4, seed: int = 0) -> Path:
    """Write the model and its tokenizer; returns the path."""
    _, model = tiny(family, layers=layers, vocab=len(SPECIAL) + 256, seed=seed)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_text(path: Path, documents: int = 6, words: int = 120) -> Path:
    """Some text with structure, UTF-8 beyond ASCII included."""
    sentence = "the quick brown fox naïvely jumps over one lazy dog; "
    parts = [f"Document {number}. " + sentence * (words // 10) for number in range(documents)]
    path.write_text("\n\n\n".join(parts), encoding="utf-8")
    return path
