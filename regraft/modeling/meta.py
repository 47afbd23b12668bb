"""A model without weights: parameters on the meta device, tables made from the config real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.auto_map import find_architecture
from ..core.checkpoint import Checkpoint
from ..core.stock_class import build_stock_config as build_stock_config
from ..core.stock_class import choose_class as choose_class
from ..core.stock_class import explain_model_errors as explain_model_errors
from ..core.stock_class import stock_class as stock_class
from ..core.stock_config import decode_floats
from ..core.stock_config import silence_transformers as silence_transformers
from .configuration_regraft import RegraftConfig
from .modeling_regraft import FRONTS


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
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            setattr(module, name, torch.zeros_like(getattr(module, name), device="cpu"))
        # Fills the buffers; on parameters, which are meta tensors, it has no effect.
        if names:
            model._init_weights(module)


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
        return FRONTS[find_architecture(fields)], RegraftConfig(**decode_floats(own))


def iter_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, value) of every buffer."""
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            yield module, name, value
