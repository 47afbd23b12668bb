"""Runnable models: a stock decoder with mixers in its attention slots."""

from .cache import CACHE, MixerState, cache_kwargs, cache_of, state_bytes
from .configuration_regraft import STATE_LAYER, RegraftConfig
from .loading import (
    build_random_model,
    check_decoder,
    force_branch,
    from_checkpoint_names,
    load,
    load_tokenizer,
    materialize,
    random_inputs,
    slots,
    to_checkpoint_names,
)
from .meta import build_meta_model
from .modeling_regraft import RegraftForCausalLM

__all__ = [
    "CACHE",
    "STATE_LAYER",
    "MixerState",
    "RegraftConfig",
    "RegraftForCausalLM",
    "force_branch",
    "cache_of",
    "random_inputs",
    "build_random_model",
    "from_checkpoint_names",
    "cache_kwargs",
    "to_checkpoint_names",
    "load",
    "load_tokenizer",
    "materialize",
    "build_meta_model",
    "slots",
    "state_bytes",
    "check_decoder",
]
