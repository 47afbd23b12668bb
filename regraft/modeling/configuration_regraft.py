"""Configuration of a stock decoder, the host, whose attention slots hold mixers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ..core.auto_map import TEXT_CONFIG, find_architecture, find_auto_map
from ..errors import RegraftError
from ..mixers.older_names import leave_out_caps
from .cache import BESIDE_KINDS, BESIDE_LAYER, STATE_LAYER
from .growing_cache import GROWING_LAYER

CAP = "attn_logit_softcapping"  # None: no cap
# Keys of a config that mixers were made for, and what a converted layer's `attention` says of each.
OF_MIXERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hidden_size": lambda attention: attention["hidden"],
    "num_attention_heads": lambda attention: attention["kv"] * attention["group"],
    "num_key_value_heads": lambda attention: attention["kv"],
    # Classes with latent attention call the width of its rotated part so.
    "head_dim": lambda attention: None if attention.get("latent") else attention["dim"],
    "attention_bias": lambda attention: attention.get("qkv_bias", False),
    "rms_norm_eps": lambda attention: attention.get("qk_norm"),
    "query_pre_attn_scalar": lambda attention: attention["scale"] ** -2,
    CAP: lambda attention: attention.get("softcap", 0.0),
}
# What the host's config object has of its own and a linearized model's config does not take over.
OWN_KEYS = ("architectures", "auto_map", "dtype", "transformers_version")
# Fields of every config, such as `id2label`, which are set before the host's class is asked.
SHARED_KEYS = tuple(field.name for field in dataclasses.fields(PreTrainedConfig))


@strict
class RegraftConfig(PreTrainedConfig):
    """Config of a linearized model: the host's own keys, and which layers hold which mixers.

    Attributes:
        host: `model_type` of the host. Its keys (`hidden_size`, `vocab_size`, ..) stand beside
            these, under the names and with the defaults that its class has for them. A model of
            several parts has its language model's keys in `text_config`.
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
        # Earlier versions nested the host's config, and had kinds of layers of their own beside it.
        self.nested = isinstance(self.host, dict)
        if isinstance(self.host, dict):
            nested = dict(self.host)
            kwargs.pop("layer_types", None)
            self.host = str(nested.pop("model_type"))
            kwargs = {key: nested[key] for key in nested if key not in OWN_KEYS} | kwargs
        kwargs.pop("model_type", None)
        # The host's other names for its keys, such as `hidden_size` for GPT-2's `n_embd`. No
        # property: every look at an attribute asks for it first, and `torch.compile` follows.
        self.__dict__["attribute_map"] = CONFIG_MAPPING[self.host].attribute_map
        self.__dict__["sub_configs"] = CONFIG_MAPPING[self.host].sub_configs
        self.auto_map = kwargs.pop("auto_map", None) or find_auto_map(self.sub_configs)

        # The host's class fills in its defaults and derives what it derives; all of it is kept
        # here, so that there is one place for each size.
        host = AutoConfig.for_model(self.host, **kwargs)
        given = OWN_KEYS if self.nested else (*OWN_KEYS, *SHARED_KEYS)
        for key, value in vars(host).items():
            if key not in given and key != "_post_init_done":
                self.__dict__[key] = value
        layers = self.get_text_config().num_hidden_layers
        self.mixers = self.mixers or [None] * layers
        self.attention = self.attention or [None] * layers
        if self.nested and getattr(self, CAP, None):
            self.attention = leave_out_caps(self.attention)

        super().__post_init__(**{key: kwargs[key] for key in kwargs if key not in vars(host)})

    def __getattr__(self, name: str) -> Any:
        # Names of the host's class, such as parallel plans and aliases that are properties.
        if name.startswith("__") or not isinstance(self.__dict__.get("host"), str):
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        name = self.__dict__.get("attribute_map", {}).get(name, name)
        found: Any = getattr(CONFIG_MAPPING[self.__dict__["host"]], name)
        return found.__get__(self) if isinstance(found, property) else found

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """The language model's config; for `decoder`, as caches ask for it: with the layer type of
        mixers.

        This is how every cache of transformers gets a `MixerState` for each mixer, and a
        `GrowingLayer` for each layer with all keys and values beside them, while the host's own
        code reads the host's `layer_types`.
        """
        if not decoder:
            found: PreTrainedConfig = self.__dict__.get(TEXT_CONFIG, self)
            return found
        view = copy.copy(self.build_decoder_config())
        kinds, _ = get_layer_types_and_kwargs(view)
        # Not strict: `num_hidden_layers` may have been set to fewer.
        # Some classes keep the list under another name.
        name = view.attribute_map.get("layer_types", "layer_types")
        if any(self.mixers or []):
            kinds = [GROWING_LAYER if kind == "full_attention" else kind for kind in kinds]
        view.__dict__[name] = [
            (BESIDE_LAYER if kind in BESIDE_KINDS else STATE_LAYER) if mixer else kind
            for mixer, kind in zip(self.mixers or [], kinds, strict=False)
        ]
        return view

    def build_decoder_config(self) -> RegraftConfig:
        """The config of the model that holds the mixers: this one, or that of the language model in
        it, made anew.
        """
        text = self.get_text_config()
        if text is self:
            return self
        return type(self)(
            host=text.model_type,
            slot=self.slot,
            mixers=self.mixers,
            attention=self.attention,
            attn_implementation=text._attn_implementation,
            experts_implementation=text._experts_implementation,
            **text.to_dict(),
        )

    def fit_layers(self) -> None:
        """Make `mixers` and `attention` fit the host's keys, before a model is built.

        With fewer layers, as of a stock model, the first ones are left. Raises RegraftError when
        there are more layers, or when a key says otherwise than what the mixers were made for.
        """
        mixers, attention = self.mixers or [], self.attention or []
        layers = self.num_hidden_layers
        if len(mixers) != len(attention) or len(mixers) < layers:
            raise RegraftError(
                f"num_hidden_layers is {layers}, while `mixers` has {len(mixers)} layers and "
                f"`attention` {len(attention)}: give all three, or add layers to the source "
                "before it is linearized"
            )
        self.mixers, self.attention = mixers[:layers], attention[:layers]
        if self.__dict__.get("layer_types"):
            self.__dict__["layer_types"] = self.__dict__["layer_types"][:layers]
        for layer, fields in enumerate(self.attention):
            if self.mixers[layer] is not None:
                self.check_layer(layer, fields)

    def check_layer(self, layer: int, attention: dict[str, Any] | None) -> None:
        """Raise RegraftError when a key says otherwise than what a layer's mixer was made for."""
        if attention is None:
            raise RegraftError(
                f"`mixers` has a mixer in layer {layer} and no `attention` there: give both"
            )
        for key, read in OF_MIXERS.items():
            asked, made = getattr(self, key, None), read(attention)
            if made is None or (asked is None and key != CAP) or math.isclose(asked or 0, made):
                continue
            raise RegraftError(
                f"{key} is {asked}, and the mixer of layer {layer} was made for {made}: leave the "
                "key as it was saved, or change the source and linearize it again"
            )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """See transformers' `PreTrainedConfig.save_pretrained`; the code is saved too.

        A model's own `save_pretrained` calls this before it uploads what it has written.
        """
        super().save_pretrained(save_directory, **kwargs)
        save_code(Path(save_directory), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All keys, with the classes that load the model."""
        fields = super().to_dict()
        del fields["nested"], fields["attribute_map"], fields["sub_configs"]
        # Classes are made for a host; files name those that they are made of.
        names = [
            re.sub(r"^Regraft\w*?(Model|For\w+)$", r"Regraft\1", name)
            for name in fields.get("architectures") or []
        ]
        if names and TEXT_CONFIG in fields:
            names = [find_architecture(fields)]
        return fields | {"architectures": names or None, "auto_map": find_auto_map(fields)}

    def validate_layer_type(self) -> None:
        """Do nothing: the stock check does not know the layer type of mixers."""


def save_code(directory: Path, config: dict[str, Any]) -> None:
    """Write the code that loads a model without regraft beside its config."""
    if __package__ == "regraft.modeling":
        remote_code = importlib.import_module("regraft.modeling.remote_code")
        remote_code.write_remote_code(directory, config)
        return
    # This is such code itself, all in one folder.
    for file in Path(__file__).parent.glob("*.py"):
        if file.name != "__init__.py" and file.parent.resolve() != directory.resolve():
            shutil.copyfile(file, directory / file.name)
