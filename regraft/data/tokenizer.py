"""A tokenizer as the cache needs it: texts to ids, the token that ends a document, and a name for what it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def end_token_ids(tokenizer: Any) -> list[int]:
    """The token that ends a document, if the tokenizer has one."""
    last = (
        tokenizer.eos_token_id
        if tokenizer.eos_token_id is not None
        else getattr(tokenizer, "sep_token_id", None)
    )
    return [last] if last is not None else []


def count_bytes(ids: Tensor, tokenizer: Any) -> Tensor:
    """UTF-8 bytes of the text of each row of ids, (rows,)."""
    return torch.tensor([len(text.encode()) for text in tokenizer.batch_decode(ids)])


@dataclass(frozen=True)
class BatchTokenizer:
    """A tokenizer and what follows from it."""

    tokenizer: Any

    @cached_property
    def end(self) -> list[int]:
        """What ends a document."""
        return end_token_ids(self.tokenizer)

    @cached_property
    def dtype(self) -> str:
        """The smallest kind of number that holds every id."""
        return (
            "<u2"
            if hasattr(self.tokenizer, "__len__") and len(self.tokenizer) <= 1 << 16
            else "<u4"
        )

    @cached_property
    def name(self) -> str:
        """A hash of what decides the ids: another tokenizer has another."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if (
            backend is not None
        ):  # before these come truncation and padding, which a caller sets and takes back
            facts: Any = backend.to_str().partition('"added_tokens"')[2]
        else:
            vocabulary = (
                self.tokenizer.get_vocab() if hasattr(self.tokenizer, "get_vocab") else None
            )
            facts = [type(self.tokenizer).__qualname__, vocabulary]
        return hashlib.sha256(
            json.dumps([facts, self.end, self.dtype], sort_keys=True).encode()
        ).hexdigest()[:16]

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, nothing added."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            return [
                found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)
            ]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids
