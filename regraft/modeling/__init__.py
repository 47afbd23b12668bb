"""Runnable models: a stock decoder with mixers in its attention slots."""

from .cache import CACHE, MixerState, cache_of, given, state_bytes
from .configuration_regraft import STATE_LAYER, RegraftConfig
from .loading import (
    branch,
    example,
    fresh,
    from_files,
    in_files,
    load,
    load_tokenizer,
    materialize,
    slots,
    wants_decoder,
)
from .meta import outline
from .modeling_regraft import RegraftForCausalLM

__all__ = [
    "CACHE",
    "STATE_LAYER",
    "MixerState",
    "RegraftConfig",
    "RegraftForCausalLM",
    "branch",
    "cache_of",
    "example",
    "fresh",
    "from_files",
    "given",
    "in_files",
    "load",
    "load_tokenizer",
    "materialize",
    "outline",
    "slots",
    "state_bytes",
    "wants_decoder",
]
