"""Configuration of a host decoder whose attention slots hold mixers."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

STATE_LAYER = "regraft_state"


@strict
class RegraftConfig(PreTrainedConfig):
    """Config of a linearized model: a stock decoder, the host, with mixers in its attention slots.

    Attributes:
        host: the source's own config.
        slot: name of layer i's attention module, with `{}` for i.
        mixers: per layer the mixer's spec, None where softmax attention is kept.
        attention: per layer what the mixer replaces, the fields of `mixers.base.Attention`; None
            where softmax attention is kept.
        use_cache: whether calls return a cache by default.
    """

    model_type = "regraft"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    host: dict[str, Any] | None = None
    slot: str = "model.layers.{}.self_attn"
    mixers: list[Any] | None = None
    attention: list[Any] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.host = self.host or {"model_type": "llama"}
        host = self.host_config()
        self.num_hidden_layers = host.num_hidden_layers
        self.mixers = self.mixers or [None] * host.num_hidden_layers
        self.attention = self.attention or [None] * host.num_hidden_layers

        # transformers and other tools look for these on the config itself.
        for key in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            setattr(self, key, getattr(host, key))
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        for key in (*tokens, "tie_word_embeddings", "sliding_window"):
            kwargs.setdefault(key, getattr(host, key, None))

        # DynamicCache makes a layer of each kind: this is how mixers get a MixerState.
        kept, _ = get_layer_types_and_kwargs(host)
        kwargs["layer_types"] = [
            STATE_LAYER if m else kind for m, kind in zip(self.mixers, kept, strict=True)
        ]
        super().__post_init__(**kwargs)

    def host_config(self) -> PreTrainedConfig:
        """The host's configuration object."""
        fields = {key: value for key, value in (self.host or {}).items() if key != "model_type"}
        return AutoConfig.for_model((self.host or {})["model_type"], **fields)

    def validate_layer_type(self) -> None:
        """Do nothing: the stock check does not know the layer type of mixers."""
