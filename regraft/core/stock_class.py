"""The class of transformers that a config names, and where that class puts the tensors of a file.

Nothing here reads weights. transformers is imported when it is needed: opening a model whose names
fit its table does without.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import explain_errors
from .anatomy import find_anatomy, read_as_auto
from .class_heads import CAUSAL, find_class
from .model_files import refuse_fetched_code
from .stock_config import decode_floats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def stock_class(fields: Mapping[str, Any]) -> tuple[Any, PreTrainedConfig]:
    """(class, config) of a stock model.

    The class is the one that the config's `architectures` names, or its family's default.
    """
    config = build_stock_config(fields)
    return choose_class(config, find_anatomy(fields).causal), config


def choose_class(config: PreTrainedConfig, causal: bool) -> Any:
    """The class that `architectures` of a config names, else the one that Auto takes for it.

    Args:
        config: as transformers reads it.
        causal: whether the family's default is a causal language model.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    named = find_class((config.architectures or [""])[0])
    if named is not None and isinstance(config, named.config_class or ()):
        return named
    autos: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel]
    autos = autos if causal else [AutoModel]
    if config.is_encoder_decoder:
        autos = [AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, *autos]
    kind = type(config)
    return next(auto._model_mapping[kind] for auto in autos if kind in auto._model_mapping)


def build_stock_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of a supported family from the mapping in a config.json.

    RegraftError for an unknown family and for kernels that would be fetched and run.
    """
    from transformers import AutoConfig

    refuse_fetched_code(fields, find_anatomy(fields).family)
    fields = read_as_auto(fields)
    plain = {key: value for key, value in fields.items() if key not in ("model_type", "auto_map")}
    with explain_model_errors(fields["model_type"]):
        config: PreTrainedConfig = AutoConfig.for_model(
            fields["model_type"], **decode_floats(plain)
        )
        return config


def explain_model_errors(name: object) -> AbstractContextManager[None]:
    """Inside, what transformers raises about a config or a model becomes a RegraftError.

    Args:
        name: the model's path or type.
    """
    what = f"transformers cannot make a model of '{name}' from its config.json"
    return explain_errors(what, "fix it, or fetch it again")


class StockNames:
    """What transformers' class does with the names of a file, for one config.

    Args:
        fields: the content of a config.json of a stock family.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.kind, self.config = stock_class(fields)
        self.causal = find_anatomy(fields).causal
        self.model = self._build(self.kind)
        self.base = self.model.base_model_prefix
        self.parameters = self.model.state_dict()

        steps = get_model_conversion_mapping(self.model)
        self.renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self.converters = [step for step in steps if isinstance(step, WeightConverter)]

    def find(self, name: str) -> str:
        """Where a tensor of a file goes: equal for two names that the class takes for one tensor.

        Args:
            name: in the file.
        """
        from transformers.core_model_loading import rename_source_key

        goal, converter = rename_source_key(
            name, self.renamings, self.converters, self.base, self.parameters
        )
        # A name of the model itself may need no more than the prefix.
        if goal not in self.parameters and name in self.parameters:
            goal, converter = rename_source_key(name, [], [], self.base, self.parameters)
        if converter is None:
            return str(goal)

        # Several tensors of the file become one of the model: the file's name tells them apart.
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return f"{goal} from {self._strip(name)}"

    def _strip(self, name: str) -> str:
        """A name without the base model's prefix."""
        return name.removeprefix(f"{self.base}.")

    def reason_to_drop(self, name: str) -> str | None:
        """Why the class does not need a tensor of a file; None when nothing says so.

        Args:
            name: in the file.
        """
        goal = self.find(name)
        # As in `_adjust_missing_and_unexpected_keys` of transformers' modeling_utils.
        patterns = set(self.model._keys_to_ignore_on_load_unexpected or ())
        buffers = {self._strip(buffer) for buffer, _ in self.model.named_buffers()}
        if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(buffer.endswith("position_ids") for buffer in buffers):
            patterns.add(r"(^|\.)position_ids$")

        if self._strip(goal) in buffers or any(re.search(pattern, goal) for pattern in patterns):
            return f"buffer: {self.kind.__name__} computes it itself"
        if goal not in self.parameters and self._strip(goal) in self.elsewhere:
            return f"{self.kind.__name__} does not use it"
        return None

    @cached_property
    def elsewhere(self) -> set[str]:
        """Parameters of this config's other classes, without the base model's prefix."""
        names = set()
        for kind in self._iter_siblings():
            try:
                names.update(self._build(kind).state_dict())
            except Exception:  # a class that does not take this config has no tensors of it
                continue
        return {self._strip(name) for name in names}

    def _iter_siblings(self) -> Iterator[Any]:
        """Other classes of the same config, in the module of this one."""
        from transformers import PreTrainedModel

        for name, kind in vars(sys.modules[self.kind.__module__]).items():
            is_model = inspect.isclass(kind) and issubclass(kind, PreTrainedModel)
            # Encoders as decoders have no tensors of their own, and warn.
            if is_model and (self.causal or not name.endswith(CAUSAL)):
                if isinstance(self.config, getattr(kind, "config_class", None) or ()):
                    yield kind

    def _build(self, kind: Any) -> PreTrainedModel:
        """A model of this config on the meta device: names and shapes, no memory."""
        import torch

        with explain_model_errors(self.config.model_type), torch.device("meta"):
            model: PreTrainedModel = kind(copy.deepcopy(self.config))  # some classes change it
        return model
