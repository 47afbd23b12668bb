"""Runnable models: a stock decoder with mixers in its attention slots.

Importing this package registers `model_type: "regraft"` with transformers' auto classes, so that
`AutoModelForCausalLM.from_pretrained` loads a saved linearized model.
"""

from transformers import AutoConfig

from . import flops
from .cache import CACHE, STATE_LAYER, MixerState, cache_kwargs, cache_of, state_bytes
from .configuration_regraft import RegraftConfig
from .image_inputs import IMAGE_TOKENS, TEXT_TOKENS, image_inputs
from .loading import (
    PAIRED,
    build_random_model,
    check_decoder,
    draw_encoder_inputs,
    force_branch,
    from_checkpoint_names,
    load,
    load_stored,
    load_tokenizer,
    materialize,
    parse_decoding_dtype,
    random_inputs,
    read_tokenizer,
    slots,
    to_checkpoint_names,
)
from .meta import build_meta_model, build_stock_config
from .modeling_regraft import (
    RegraftForCausalLM,
    RegraftForImageTextToText,
    RegraftForSequenceClassification,
    RegraftForTokenClassification,
    RegraftModel,
)

__all__ = [
    "CACHE",
    "IMAGE_TOKENS",
    "STATE_LAYER",
    "TEXT_TOKENS",
    "MixerState",
    "RegraftConfig",
    "RegraftForCausalLM",
    "RegraftForImageTextToText",
    "RegraftForSequenceClassification",
    "RegraftForTokenClassification",
    "RegraftModel",
    "build_meta_model",
    "build_random_model",
    "build_stock_config",
    "cache_kwargs",
    "cache_of",
    "check_decoder",
    "flops",
    "force_branch",
    "from_checkpoint_names",
    "image_inputs",
    "load",
    "load_stored",
    "load_tokenizer",
    "materialize",
    "parse_decoding_dtype",
    "draw_encoder_inputs",
    "PAIRED",
    "random_inputs",
    "read_tokenizer",
    "slots",
    "state_bytes",
    "to_checkpoint_names",
]

AutoConfig.register("regraft", RegraftConfig, exist_ok=True)
