"""One model class for all: a stock decoder, the host, with mixers in its attention slots."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from ..core.shapes import Float, Int
from ..errors import RegraftError
from ..mixers.base import Attention, MixerContext
from ..mixers.registry import build
from .cache import CACHE, MixerState, cache_kwargs
from .configuration_regraft import RegraftConfig

# Names under which decoder layers pass the cache to their attention.
CACHES = (CACHE, "layer_past")
# What transformers reads off a class before it runs the attention of a model in another way.
ABILITIES = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
)


class MixerSlot(nn.Module):
    """A mixer where the host's decoder layer expects its attention module."""

    def __init__(self, spec: dict[str, Any], attention: Attention, layer: int):
        super().__init__()
        self.mixer = build(spec, attention)
        self.layer, self.rotary = layer, attention.rotary

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        position_embeddings: (
            tuple[Float[Tensor, "rows time rotary"], Float[Tensor, "rows time rotary"]] | None
        ) = None,
        mixing: MixerContext | None = None,
        **host_arguments: Any,
    ) -> tuple[Float[Tensor, "batch time hidden"], None]:
        """The mixer's output, and None in the place of attention weights.

        Args:
            hidden_states: input of the slot.
            position_embeddings: cos and sin, from hosts that pass them.
            mixing: padding and documents, passed through by the host.
            host_arguments: what else the family passes to its attention; only the cache is used.

        Raises RegraftError when the cache has keys and values for this layer.
        """
        caches = [host_arguments[name] for name in CACHES if host_arguments.get(name) is not None]
        entry = caches[0].layers[self.layer] if caches else None
        if entry is not None and not isinstance(entry, MixerState):
            raise RegraftError(
                f"layer {self.layer} got a {type(entry).__name__} cache but holds a mixer: pass "
                "DynamicCache(config=model.config) or no cache"
            )

        mixing = mixing or MixerContext()
        rotary = position_embeddings if self.rotary else None
        mixing = MixerContext(rotary, mixing.valid, mixing.segments)
        y, state = self.mixer(hidden_states, mixing, entry.state if entry is not None else None)
        if entry is not None:
            entry.store(state, hidden_states.shape[1])
        return y, None


class RegraftForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model: any supported host, with the mixers that `config.mixers` names.

    Left and right padding are read from `attention_mask` (batch, time), packed documents from
    `position_ids` that restart, without a mask or cache. The decoding state is in a
    `DynamicCache(config=model.config)`. Layers that keep softmax attention run it in the ways that
    the host's class supports.
    """

    config_class = RegraftConfig
    base_model_prefix = "host"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []

    def __init__(self, config: RegraftConfig):
        # transformers looks at these while it initialises the outer model.
        host_config = config.host_config()
        host_class = AutoModelForCausalLM._model_mapping[type(host_config)]
        for ability in ABILITIES:
            setattr(self, ability, getattr(host_class, ability))
        super().__init__(config)

        # As submodules are: in the dtype that the outer model is made in, not in the config's.
        host_config.use_cache = config.use_cache
        self.host = AutoModelForCausalLM.from_config(
            host_config,
            dtype=torch.get_default_dtype(),
            attn_implementation=config._attn_implementation,
            trust_remote_code=False,
        )

        layers = zip(config.mixers or [], config.attention or [], strict=True)
        for layer, (spec, attention) in enumerate(layers):
            if spec is not None:
                slot = MixerSlot(spec, Attention(**attention), layer)
                self.host.set_submodule(config.slot.format(layer), slot)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The host's token embedding."""
        return self.host.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the host's token embedding."""
        self.host.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The host's head."""
        return self.host.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the host's head."""
        self.host.set_output_embeddings(new_embeddings)

    def slots(self) -> list[nn.Module]:
        """The attention slot of every layer, in order."""
        return [
            self.host.get_submodule(self.config.slot.format(i))
            for i in range(self.config.num_hidden_layers)
        ]

    def forward_decoder(
        self,
        input_ids: Int[Tensor, "batch time"],
        position_ids: Int[Tensor, "batch time"] | None = None,
    ) -> Any:
        """The decoder's output before the head, without a cache; arguments as in `forward`."""
        mixing = build_mixer_context(input_ids.shape[1], None, position_ids, None)
        decoder = self.host.get_decoder()
        return decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, mixing=mixing
        )

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows time"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time hidden"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The host's output, with logits (batch, time, vocab).

        Args:
            input_ids: tokens; or `inputs_embeds` in their place.
            attention_mask: (batch, time), 1 where a token counts, the cache's tokens included.
            position_ids: positions; where they restart, a new document begins.
            cache: a `DynamicCache(config=model.config)`.
            labels: tokens to predict, for a loss.
            use_cache: whether to return a cache; the config's value when left out.
            logits_to_keep: how many last tokens get logits, 0 for all.
            past_key_values: the older name of `cache`.
            kwargs: passed on to the host.

        Raises RegraftError without an input, for two different caches, for a mask that is not 2-D,
        and for a cache of another model.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            kinds = type(cache).__name__, type(past_key_values).__name__
            raise RegraftError(
                f"cache ({kinds[0]}) and past_key_values ({kinds[1]}) are two names of one thing: "
                "pass one of them"
            )
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise RegraftError(
                f"input_ids is {input_ids} and inputs_embeds is {inputs_embeds}: pass one of them"
            )

        # Hosts pass `mixing` through to every attention slot with their other keyword arguments.
        mixing = build_mixer_context(tokens.shape[1], attention_mask, position_ids, cache)
        if all(self.config.mixers):
            attention_mask = None  # no softmax layer is left that reads it
        output = self.host(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            mixing=mixing,
            **cache_kwargs(cache),
            **kwargs,
        )
        if cache is not None:
            self.check_cache_reached(cache, tokens.shape[1])
        return output

    def check_cache_reached(self, cache: Cache, time: int) -> None:
        """Raise RegraftError when the host did not pass the cache on to a mixer.

        Such a mixer would silently forget all tokens before the current call.

        Args:
            cache: after a forward pass.
            time: tokens in that pass.
        """
        states = [layer for layer in cache.layers if isinstance(layer, MixerState)]
        if any(state.get_seq_length() < time for state in states):
            raise RegraftError(
                f"transformers {transformers.__version__} hands no cache to attention under the "
                f"names {', '.join(CACHES)}: install the version that regraft was tested with "
                "(constraints.txt)"
            )


def build_mixer_context(
    time: int,
    mask: Tensor | None,
    position_ids: Int[Tensor, "rows time"] | None,
    cache: Cache | None,
) -> MixerContext:
    """Padding and documents of the last `time` tokens, without rotary tables.

    Args:
        time: tokens of this call.
        mask: (batch, cached tokens + time), 1 where a token counts.
        position_ids: positions of the tokens, which restart at each document of a packed row.
        cache: rows that go on from a cache are not packed.

    Raises RegraftError for a mask that is not 2-D.
    """
    valid = segments = None
    if mask is not None:
        if mask.ndim != 2:
            raise RegraftError(
                f"attention_mask has shape {tuple(mask.shape)}: mixers take (batch, time), 1 where "
                "a token counts"
            )
        # None where all tokens count: mixers have a shorter way for that.
        valid = mask[:, -time:].bool()
        valid = None if bool(valid.all()) else valid
    elif cache is None and position_ids is not None and position_ids.ndim == 2 and time > 1:
        restart = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if bool(restart.any()):
            segments = torch.nn.functional.pad(restart.long().cumsum(1), (1, 0))
    return MixerContext(None, valid, segments)
