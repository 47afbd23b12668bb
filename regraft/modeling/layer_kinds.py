"""Which mixer every layer has, and what its decoding state weighs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.checkpoint import Checkpoint
from ..mixers.base import Attention
from ..mixers.registry import mixer_class


def mixers_of(checkpoint: Checkpoint) -> list[dict[str, Any] | None]:
    """The mixer spec of every layer, None where softmax attention is."""
    return list(checkpoint.config.get("mixers") or [None] * checkpoint.layers)


def layer_kinds(checkpoint: Checkpoint) -> list[str]:
    """A name for every layer's mixer: softmax, or as `gated(gated_deltanet, window)`."""
    return [_mixer_name(spec) if spec else "softmax" for spec in mixers_of(checkpoint)]


def _mixer_name(spec: Mapping[str, Any]) -> str:
    nested = [_mixer_name(value) for value in spec.values() if isinstance(value, Mapping)]
    return f"{spec['name']}({', '.join(nested)})" if nested else str(spec["name"])


def attention_of(checkpoint: Checkpoint, layer: int) -> Attention:
    """The sizes of a layer's attention."""
    return Attention(**checkpoint.anatomy.attention(checkpoint.config, layer))


def kept_tokens(checkpoint: Checkpoint, layer: int, context: int) -> int:
    """Tokens that a softmax layer sees and keeps: the source's own sliding window, if it has one."""
    host = checkpoint.config.get("host", checkpoint.config)
    kinds, window = host.get("layer_types"), host.get("sliding_window")
    sliding = kinds[layer] == "sliding_attention" if kinds else host["model_type"] == "mistral"
    return min(context, window) if sliding and window else context


def state_bytes(checkpoint: Checkpoint, context: int) -> dict[str, int]:
    """Decoding state of one sequence after `context` tokens, by kind of layer, in float32."""
    table: dict[str, int] = {}
    context = context if checkpoint.anatomy.causal else 0  # encoders keep no state
    for layer, (kind, spec) in enumerate(
        zip(layer_kinds(checkpoint), mixers_of(checkpoint), strict=True)
    ):
        attention = attention_of(checkpoint, layer)
        if spec is None:
            numbers = 2 * attention.kv * attention.dim * kept_tokens(checkpoint, layer, context)
        else:
            numbers = mixer_class(spec["name"]).state_size(attention, spec)
        table[kind] = table.get(kind, 0) + 4 * numbers
    return table
