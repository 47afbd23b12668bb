"""A model without weights: parameters on the meta device, tables made from the config real."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
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
    fields = {**checkpoint.config, "dtype": "float32"}
    if fields["model_type"] == "regraft":
        fields["host"] = {**fields["host"], "dtype": "float32"}
        arguments = {
            key: value for key, value in fields.items() if key not in ("model_type", "auto_map")
        }
        with explain_model_errors(checkpoint.origin):
            model: Any = RegraftForCausalLM(RegraftConfig(**arguments))
    else:
        kind, config = stock_class(fields)
        with explain_model_errors(checkpoint.origin):
            model = kind(config)
    model.tie_weights()
    return model.eval()


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
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    # Only a model of this config: the package has functions and trainers under other names.
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if is_model and isinstance(config, named.config_class or ()):
        return named
    auto = AutoModelForCausalLM if causal else AutoModel
    return auto._model_mapping[type(config)]


def build_stock_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of a supported family from the mapping in a config.json.

    RegraftError for an unknown family and for kernels that would be fetched and run.
    """
    family = find_anatomy(fields).family
    refuse_fetched_code(fields, family)
    plain = {key: value for key, value in fields.items() if key != "auto_map"}
    # Through a file: only its reader makes the same of it as `from_pretrained` does, such as a
    # Ministral of a Mistral whose layers differ.
    with (
        explain_model_errors(fields["model_type"]),
        silence_transformers(),
        tempfile.TemporaryDirectory() as folder,
    ):
        (Path(folder) / "config.json").write_text(json.dumps(plain, default=str), encoding="utf-8")
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        config.name_or_path = ""
        return config


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bar and no table of what it did not find."""
    logging = transformers.utils.logging
    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


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
