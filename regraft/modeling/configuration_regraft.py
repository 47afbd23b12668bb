"""Configuration of a stock decoder, the host, whose attention slots hold mixers."""

from __future__ import annotations

import copy
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ..core.auto_map import AUTO_MAP

STATE_LAYER = "regraft_state"
# What the host's config object has of its own and a linearized model's config does not take over.
OWN_KEYS = ("architectures", "auto_map", "dtype", "transformers_version")


@strict
class RegraftConfig(PreTrainedConfig):
    """Config of a linearized model: the host's own keys, and which layers hold which mixers.

    Attributes:
        host: `model_type` of the host. Its keys (`hidden_size`, `vocab_size`, ..) stand beside
            these, under the names and with the defaults that its class has for them.
        slot: name of layer i's attention module, with `{}` for i.
        mixers: per layer the mixer's spec, None where softmax attention is kept.
        attention: per layer what the mixer replaces, the fields of `mixers.base.Attention`; None
            where softmax attention is kept.
        nested: whether it was read from files of an earlier version, which nest the host's names.
    """

    model_type = "regraft"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    host: str | dict[str, Any] = "llama"
    slot: str = "model.layers.{}.self_attn"
    mixers: list[Any] | None = None
    attention: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Earlier versions nested the host's config, and its weights behind "host.".
        self.nested = isinstance(self.host, dict)
        if isinstance(self.host, dict):
            nested = dict(self.host)
            self.host = str(nested.pop("model_type"))
            kwargs = {key: nested[key] for key in nested if key not in OWN_KEYS} | kwargs
        kwargs.pop("model_type", None)
        # The host's other names for its keys, such as `hidden_size` for GPT-2's `n_embd`. No
        # property: every look at an attribute asks for it first, and `torch.compile` follows.
        self.__dict__["attribute_map"] = CONFIG_MAPPING[self.host].attribute_map
        self.auto_map = kwargs.pop("auto_map", None) or dict(AUTO_MAP)

        # The host's class fills in its defaults and derives what it derives; all of it is kept
        # here, so that there is one place for each size.
        host = AutoConfig.for_model(self.host, **kwargs)
        for key, value in vars(host).items():
            if key not in OWN_KEYS and key != "_post_init_done":
                self.__dict__[key] = value
        self.mixers = self.mixers or [None] * self.num_hidden_layers
        self.attention = self.attention or [None] * self.num_hidden_layers

        super().__post_init__(**{key: kwargs[key] for key in kwargs if key not in vars(host)})

    def __getattr__(self, name: str) -> Any:
        # Names of the host's class, such as parallel plans and aliases that are properties.
        if name.startswith("__") or not isinstance(self.__dict__.get("host"), str):
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        found: Any = getattr(CONFIG_MAPPING[self.__dict__["host"]], name)
        return found.__get__(self) if isinstance(found, property) else found

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """This config; for `decoder`, as caches ask for it: with the layer type of mixers.

        This is how every cache of transformers gets a `MixerState` for each mixer, while the
        host's own code reads the host's `layer_types`.
        """
        if not decoder:
            return self
        kinds, _ = get_layer_types_and_kwargs(self)
        view = copy.copy(self)
        view.__dict__["layer_types"] = [
            STATE_LAYER if mixer else kind
            for mixer, kind in zip(self.mixers or [], kinds, strict=True)
        ]
        return view

    def to_dict(self) -> dict[str, Any]:
        """All keys, with the classes that load the model."""
        fields = super().to_dict()
        del fields["nested"], fields["attribute_map"]
        # Classes are made for a host; files name those that they are made of.
        names = [
            re.sub(r"^Regraft\w*?(Model|For\w+)$", r"Regraft\1", name)
            for name in fields.get("architectures") or []
        ]
        return fields | {"architectures": names or None, "auto_map": dict(AUTO_MAP)}

    def validate_layer_type(self) -> None:
        """Do nothing: the stock check does not know the layer type of mixers."""
