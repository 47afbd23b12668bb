"""How far back each layer of a stock model attends, as transformers reads its config."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

from transformers import AutoConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ..core.anatomy import Config, find_anatomy
from ..core.stock_config import decode_floats
from ..errors import RegraftError, explain_errors

KINDS = ("full_attention", "sliding_attention")
# Layers that have a state, or nothing, in the place of softmax attention, or a state beside it.
STATES = ("linear_attention", "conv", "mamba", "recurrent", "dummy", "hybrid")
# Softmax attention that begins anew at every chunk: such layers stay as they are, since their cost
# does not grow with the text and a state would run on over the chunk's end.
CHUNKED = "chunked_attention"


def source_windows(config: Config, states: bool = False) -> list[int | None]:
    """By layer, the last tokens that a token sees, itself included; None for all of them.

    Args:
        config: of a stock decoder, the mapping in its config.json.
        states: whether layers that mixers never replace are taken: with a state in the place of
            attention, or with attention in chunks, both as None.

    RegraftError for other layers that see other tokens than the last ones.
    """
    family = config["model_type"]
    stock, kinds, windows = _read_layers(config)
    if getattr(stock, "use_bidirectional_attention", None):
        raise RegraftError(
            f"{family} config has use_bidirectional_attention = true: mixers read from left to "
            "right, give a decoder"
        )
    own = find_anatomy(config).windows
    if own is not None:
        return own(config)
    for layer, kind in enumerate(kinds):
        if kind not in KINDS and not (states and kind in (*STATES, CHUNKED)):
            raise RegraftError(
                f"layer {layer} of this {family} has '{kind}', which mixers do not carry over: "
                f"linearize a model whose layers are {' or '.join(KINDS)}"
            )
    if not masks_windows(type(stock).__module__):
        return [None] * len(kinds)
    return windows


@cache
def masks_windows(module: str) -> bool:
    """Whether the classes of a config's module have windows; in some only their caches slide."""
    name = module.replace(".configuration_", ".modeling_")
    try:
        source = inspect.getsource(importlib.import_module(name))
    except ImportError:  # the class of another type
        return True
    return "sliding_window_causal_mask" in source or "create_causal_mask" not in source


def cached_tokens(config: Config) -> list[int | None]:
    """By layer, how many tokens transformers' cache keeps at most; None for all of them.

    Args:
        config: of a stock decoder, the mapping in its config.json; its layers may be of any kind.
    """
    return _read_layers(config)[2]


def chunked_layers(config: Config) -> list[int]:
    """The layers of a stock decoder whose attention begins anew at every chunk."""
    return [layer for layer, kind in enumerate(_read_layers(config)[1]) if kind == CHUNKED]


def _read_layers(config: Config) -> tuple[Any, list[str], list[int | None]]:
    """(config, kind of every layer, its window).

    Classes derive these from several keys and defaults of their own, so transformers' config says
    them.
    """
    family = config["model_type"]
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    with explain_errors(f"transformers cannot read the config of a {family}", "fix config.json"):
        stock = AutoConfig.for_model(family, **decode_floats(fields)).get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(stock)
    return stock, list(kinds), [option.get("sliding_window") for option in options]
