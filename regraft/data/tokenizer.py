"""A tokenizer as the token cache needs it: texts to ids, and a name for what it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def end_token_ids(tokenizer: Any) -> list[int]:
    """The token that ends a document, as a list; empty where the tokenizer has none."""
    last = tokenizer.eos_token_id
    if last is None:
        last = getattr(tokenizer, "sep_token_id", None)  # BERT's
    return [] if last is None else [last]


def count_bytes(ids: Tensor, tokenizer: Any) -> Tensor:
    """UTF-8 bytes of the text of each row of ids: (rows, length) -> (rows,)."""
    return torch.tensor([len(text.encode()) for text in tokenizer.batch_decode(ids)])


@dataclass(frozen=True)
class BatchTokenizer:
    """A tokenizer of transformers, and what the token cache has to know of it."""

    tokenizer: Any

    @cached_property
    def end(self) -> list[int]:
        """The token that is appended to each document, if there is one."""
        return end_token_ids(self.tokenizer)

    @cached_property
    def dtype(self) -> str:
        """The smallest NumPy dtype that holds every id: 2 or 4 bytes, little-endian."""
        fits = hasattr(self.tokenizer, "__len__") and len(self.tokenizer) <= 1 << 16
        return "<u2" if fits else "<u4"

    @cached_property
    def name(self) -> str:
        """A hash of everything that decides the ids: another tokenizer has another name."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        facts: Any
        if backend is not None:
            # The keys before "added_tokens" are truncation and padding, which callers switch on and
            # off again; the cache does not use them.
            facts = backend.to_str().partition('"added_tokens"')[2]
        else:
            has_vocabulary = hasattr(self.tokenizer, "get_vocab")
            vocabulary = self.tokenizer.get_vocab() if has_vocabulary else None
            facts = [type(self.tokenizer).__qualname__, vocabulary]

        text = json.dumps([facts, self.end, self.dtype], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without a start or end token."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # The fast way gives the same ids, but would truncate and pad where that is switched on.
        if backend is not None and backend.truncation is None and backend.padding is None:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids
