"""Which mixer every layer has, and the size of its decoding state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.attention import has_softmax
from ..core.checkpoint import Checkpoint
from ..mixers.attention import Attention
from ..mixers.registry import mixer_class
from ..mixers.source_windows import cached_tokens

PER_LAYER = "per_layer_config"  # config key of settings by the number of a layer
STATE = "state"
OWN_SIZES = "attention with sizes of its own"


def mixers_of(checkpoint: Checkpoint) -> list[dict[str, Any] | None]:
    """The mixer spec of every layer, None for softmax attention."""
    return list(checkpoint.config.get("mixers") or [None] * checkpoint.layers)


def layer_kinds(checkpoint: Checkpoint) -> list[str]:
    """The kind of every layer: `softmax`, `state` where the source has no softmax attention,
    `attention with sizes of its own` where the config has settings of that layer, or such as
    `gated(gated_deltanet, window)`.
    """
    host, config = (
        checkpoint.anatomy.host(checkpoint.config),
        checkpoint.anatomy.host_config(checkpoint.config),
    )
    text = checkpoint.anatomy.text_config(checkpoint.config)
    own = {str(layer) for layer in text.get(PER_LAYER) or ()}

    def find_kind(layer: int, spec: Mapping[str, Any] | None) -> str:
        if spec:
            return _mixer_name(spec)
        if has_softmax(host, config, layer):
            return "softmax"
        return OWN_SIZES if str(layer) in own else STATE

    return [find_kind(layer, spec) for layer, spec in enumerate(mixers_of(checkpoint))]


def _mixer_name(spec: Mapping[str, Any]) -> str:
    nested = [_mixer_name(value) for value in spec.values() if isinstance(value, Mapping)]
    return f"{spec['name']}({', '.join(nested)})" if nested else str(spec["name"])


def attention_of(checkpoint: Checkpoint, layer: int) -> Attention:
    """The sizes of a layer's attention."""
    return Attention(**checkpoint.anatomy.attention(checkpoint.config, layer))


def kept_tokens(checkpoint: Checkpoint, context: int) -> list[int]:
    """By layer, tokens whose keys softmax attention keeps: all, or the source's sliding window."""
    if not checkpoint.anatomy.host(checkpoint.config).causal:
        return [context] * checkpoint.layers
    config = checkpoint.anatomy.text_config(checkpoint.config)
    # Of a decoder taken out of a model with an encoder, transformers counts the encoder's layers.
    windows = cached_tokens(config)
    windows += [None] * (checkpoint.layers - len(windows))
    return [min(context, window or context) for window in windows[: checkpoint.layers]]


def cached_numbers(checkpoint: Checkpoint) -> int:
    """Numbers that softmax attention keeps of a token: keys and values, or the latent and the keys
    that heads share.
    """
    sizes = checkpoint.sizes
    if sizes.get("latent"):
        return sizes["latent"] + sizes["rope"]
    return 2 * sizes["kv"] * sizes["dim"]


def state_bytes(checkpoint: Checkpoint, context: int) -> dict[str, int]:
    """Bytes of one sequence's decoding state in float32, by kind of layer.

    Args:
        checkpoint: the model.
        context: tokens seen.
    """
    table: dict[str, int] = {}
    context = context if checkpoint.anatomy.causal else 0  # encoders keep no state
    kept = kept_tokens(checkpoint, context)
    kinds = zip(layer_kinds(checkpoint), mixers_of(checkpoint), strict=True)
    for layer, (kind, spec) in enumerate(kinds):
        if kind in (STATE, OWN_SIZES):
            continue  # the same before and after; a state is of constant size
        if spec is None:
            numbers = cached_numbers(checkpoint) * kept[layer]
        else:
            attention = attention_of(checkpoint, layer)
            numbers = mixer_class(spec["name"]).state_size(attention, spec)
        table[kind] = table.get(kind, 0) + 4 * numbers
    return table
