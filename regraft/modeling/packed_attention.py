"""Attention of a few queries without copies of keys and values for the heads that share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "regraft_packed"  # under which transformers' registries find it
MOST = 64  # queries; with more, copies are the smaller part of the work


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, for 2 to `MOST` queries faster.

    The queries of all heads that share keys and values become rows of one head. transformers does
    so for a single query only; for several behind a cache it copies keys and values for each head.

    Args:
        module: the attention, which has `num_key_value_groups`.
        query: (batch, heads, queries, dim).
        key, value: (batch, kv, keys, dim).
        attention_mask: (batch, 1, queries, keys), True or 0 where a query sees a key.
        dropout: of the weights.
        scaling: of the scores.
        kwargs: passed on.

    Returns:
        (batch, queries, heads, dim), and None in the place of weights.
    """
    group, queries = query.shape[1] // key.shape[1], query.shape[2]
    shared = attention_mask is not None and attention_mask.shape[1] == 1
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if group == 1 or not 1 < queries <= MOST or not shared or special or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    assert attention_mask is not None
    rows = query.unflatten(1, (-1, group)).flatten(2, 3)  # (batch, kv, group * queries, dim)
    mask = attention_mask.repeat(1, 1, group, 1)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    heads = out.unflatten(2, (group, queries)).flatten(1, 2)
    return heads.transpose(1, 2).contiguous(), None


@contextmanager
def packed_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model whose attention is `sdpa` uses `packed_attention`; another keeps its own."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
