"""A runnable model from a directory, a GGUF file or an open checkpoint; the attention slots of any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from ..checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.gated import Gated
from .configuration_regraft import RegraftConfig
from .modeling_regraft import RegraftForCausalLM


def materialize(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint, source or linearized, built in memory without writing it; in eval mode.

    Raises RegraftError when a tensor the model needs is not in the checkpoint, or the other way round.
    """
    fields = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", "auto_map")}
    if checkpoint.config["model_type"] == "regraft":
        build: Any = lambda: RegraftForCausalLM(RegraftConfig(**fields))  # noqa: E731
    else:
        config = AutoConfig.for_model(checkpoint.config["model_type"], **fields)
        build = lambda: AutoModelForCausalLM.from_config(config)  # noqa: E731
    with no_init_weights():
        model = build()
    values = {checkpoint.names[key]: lazy.read().to(dtype) for key, lazy in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(values, strict=False, assign=True)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if lost := (set(missing) - tied) | set(unexpected):
        raise RegraftError(
            f"'{checkpoint.path}' does not fit its model: parameter '{sorted(lost)[0]}' has no counterpart"
        )
    model.tie_weights()
    return model.to(dtype).eval()


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model at `path`: a directory of a supported family or of regraft's own, or a GGUF file; in eval mode."""
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    model = materialize(checkpoint, dtype)
    generation = Path(checkpoint.path) / "generation_config.json"
    if generation.exists():
        model.generation_config = type(model.generation_config).from_pretrained(checkpoint.path)
    return model


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model; RegraftError when there is none."""
    folder = Checkpoint.open(path).path
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RegraftError(
            f"no tokenizer in '{folder}': put tokenizer.json there ({str(error).splitlines()[0]})"
        ) from error


def slots(model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> list[nn.Module]:
    """The attention module of every layer, in order. A stock model's are found by its checkpoint's anatomy."""
    if isinstance(model, RegraftForCausalLM):
        return model.slots()
    if checkpoint is None:
        raise RegraftError(f"slots of a {type(model).__name__} are named by its anatomy: pass the checkpoint too")
    return [model.get_submodule(checkpoint.anatomy.slot.format(i)) for i in range(model.config.num_hidden_layers)]


@contextmanager
def branch(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, every gated combinator gives only its `window` or `linear` branch; None leaves the gates alone."""
    if name not in (None, "window", "linear"):
        raise RegraftError(f"a gated mixer has no branch '{name}': use window, linear or None")
    gated = [module for module in model.modules() if isinstance(module, Gated)]
    for module in gated:
        module.force = name
    try:
        yield
    finally:
        for module in gated:
            module.force = None
