"""Names and shapes of a multimodal model's tensors, read from its stock class without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.part import Config
from ...core.stock_class import choose_class, explain_model_errors
from ...core.stock_config import config_class, silence_transformers
from ...errors import RegraftError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """Where a class has its language model, and what it has beside it.

    Attributes:
        module: name of the language model's module.
        prefix: of its tensors in files.
        head: name in files of the output embedding; "" without one.
        text: shapes of the language model's tensors by name in files.
        others: (name in the model, shape) of all other tensors by name in files.
    """

    module: str
    prefix: str
    head: str
    text: dict[str, Shape]
    others: dict[str, tuple[str, Shape]]


def read_whole_config(config: Config) -> dict[str, Any]:
    """A config with all that its class derives and fills in, its parts as mappings too.

    RegraftError when the class refuses it.
    """
    family = str(config["model_type"])
    with silence_transformers(), explain_model_errors(family):
        whole: dict[str, Any] = _read_config(config).to_dict()
    return whole


def _read_config(config: Config) -> Any:
    fields = {key: value for key, value in config.items() if key != "auto_map"}
    return config_class(str(config["model_type"])).from_dict(copy.deepcopy(fields))


def read_outline(config: Config) -> Outline:
    """The outline of a config's class; RegraftError when transformers cannot build it."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with silence_transformers(), explain_model_errors(config["model_type"]):
        read = _read_config(config)
        with torch.device("meta"):
            model = choose_class(read, True)(read)
        values = model.state_dict(keep_vars=True)
        stored = revert_weight_conversion(model, dict(values))
    names = {id(value): name for name, value in values.items()}

    embedding = model.get_input_embeddings().weight
    module = _find_language_model(model)
    in_files = next(name for name, value in stored.items() if value is embedding)
    prefix = in_files.removesuffix("embed_tokens.weight")
    output = model.get_output_embeddings()
    head = next((name for name, value in stored.items() if output and value is output.weight), "")
    beside = {name: value for name, value in stored.items() if name != head}
    return Outline(
        module=module,
        prefix=prefix,
        head=head,
        text=_shapes({name: beside[name] for name in beside if name.startswith(prefix)}),
        others={
            name: (names.get(id(value), name), tuple(value.shape))
            for name, value in beside.items()
            if not name.startswith(prefix)
        },
    )


def _shapes(values: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _find_language_model(model: Any) -> str:
    """Name of the module that has the layers and the embedding that tokens are read by."""
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if getattr(module, "embed_tokens", None) is embedding and hasattr(module, "layers"):
            return str(name)
    raise RegraftError(
        f"{type(model).__name__} has no language model that regraft finds: save its text model "
        "alone and open that"
    )
