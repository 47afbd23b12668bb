"""A model without weights: parameters on the meta device, tables made from the config real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..core.anatomy import find_anatomy
from ..core.checkpoint import Checkpoint
from ..core.model_files import refuse_fetched_code
from ..errors import explain_errors
from .configuration_regraft import RegraftConfig
from .modeling_regraft import RegraftForCausalLM


def build_meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint with parameters on the meta device, which take no memory.

    Buffers are real. They are rotary tables and the like, which no file holds: the class's own
    initialisation makes them.
    """
    with torch.device("meta"):
        model = build_from_config(checkpoint)

    with explain_model_errors(checkpoint.origin):
        fill_buffers(model)
    return model


def fill_buffers(model: PreTrainedModel) -> None:
    """Make buffers that are on the meta device real."""
    stock = model.host if isinstance(model, RegraftForCausalLM) else model
    for module in stock.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            setattr(module, name, torch.zeros_like(getattr(module, name), device="cpu"))
        # Fills the buffers; on parameters, which are meta tensors, it has no effect.
        if names:
            stock._init_weights(module)


def build_from_config(checkpoint: Checkpoint) -> Any:
    """A model of a checkpoint's config, in float32 and eval mode, without the checkpoint's weights.

    Its tensors are on PyTorch's current default device.
    """
    kind, config = model_class({**checkpoint.config, "dtype": "float32"})
    with explain_model_errors(checkpoint.origin):
        model = kind(config)
    model.tie_weights()
    return model.eval()


def model_class(fields: Mapping[str, Any]) -> tuple[Any, PreTrainedConfig]:
    """(class, config) of a stock or linearized model from the mapping in its config.json."""
    if fields["model_type"] != "regraft":
        return stock_class(fields)
    own = {key: value for key, value in fields.items() if key not in ("model_type", "auto_map")}
    with explain_model_errors("regraft"):
        return RegraftForCausalLM, RegraftConfig(**own)


def stock_class(fields: Mapping[str, Any]) -> tuple[Any, PreTrainedConfig]:
    """(class, config) of a stock model.

    The class is the one that the config's `architectures` names, or its family's default.
    """
    config = build_stock_config(fields)
    auto = AutoModelForCausalLM if find_anatomy(fields).causal else AutoModel
    named: Any = getattr(transformers, (fields.get("architectures") or [""])[0], None)
    # Only a model of this config: the package has functions and trainers under other names.
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if is_model and isinstance(config, named.config_class or ()):
        return named, config
    return auto._model_mapping[type(config)], config


def build_stock_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of a supported family from the mapping in a config.json.

    RegraftError for an unknown family and for kernels that would be fetched and run.
    """
    family = find_anatomy(fields).family
    refuse_fetched_code(fields, family)
    plain = {key: value for key, value in fields.items() if key not in ("model_type", "auto_map")}
    with explain_model_errors(fields["model_type"]):
        config: PreTrainedConfig = AutoConfig.for_model(fields["model_type"], **plain)
        return config


def explain_model_errors(name: object) -> AbstractContextManager[None]:
    """Inside, what transformers raises about a config or a model becomes a RegraftError.

    Args:
        name: the model's path or type.
    """
    what = f"transformers cannot make a model of '{name}' from its config.json"
    return explain_errors(what, "fix it, or fetch it again")


def iter_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, value) of every buffer."""
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            yield module, name, value
