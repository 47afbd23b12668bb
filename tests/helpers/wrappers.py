"""Tiny random models around a language model, which read images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from helpers.zoo import COUPLED, SIZES, perturb

IMAGE = 96  # the image's token, the last of the vocabulary
TEXT = {key: value for key, value in SIZES.items() if key != "pad_token_id"}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 24, "sliding_window": 16}
# Of a vision tower: 3 x 3 patches, or 4 x 4 where four of them become one token.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 15,
    "patch_size": 5,
}
QUADS = VISION | {"image_size": 20}
PIXTRAL = QUADS | {"head_dim": 16, "model_type": "pixtral"}
# Layers with full attention have wider heads, each patch comes with its place.
GEMMA4: dict[str, Any] = {
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "sliding_window": 16,
}
PLACED = VISION | {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "patch_size": 4,
    "pooling_kernel_size": 2,
}
# Of Qwen's: sizes have other names, and the merger writes the stream.
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
QWEN2_5 = QWEN | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3 = QWEN | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 40,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN3_5: dict[str, Any] = MROPE | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Model type -> (keys of its text model, of its vision tower, its own).
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (GEMMA | LAYERS, VISION, {"mm_tokens_per_image": 9}),
    "gemma4": (GEMMA4, PLACED | {"position_embedding_size": 32}, {"audio_config": None}),
    "idefics3": ({"model_type": "llama"}, QUADS, {"scale_factor": 2}),
    "internvl": ({"model_type": "qwen2"}, QUADS, {"downsample_ratio": 0.5}),
    "llava": ({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {}),
    "mistral3": ({"model_type": "mistral"}, PIXTRAL, {"spatial_merge_size": 2}),
    "paligemma": ({"model_type": "gemma"}, VISION | {"projection_dim": 40}, {"projection_dim": 40}),
    "qwen2_5_vl": (MROPE | COUPLED, QWEN2_5, {}),
    "qwen2_vl": (MROPE | COUPLED, QWEN | {"embed_dim": 32, "hidden_size": 32}, {}),
    "qwen3_5": (QWEN3_5, QWEN3, {}),
    "qwen3_vl": (MROPE, QWEN3, {}),
    "smolvlm": ({"model_type": "llama"}, QUADS, {"scale_factor": 2}),
    "vipllava": ({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {}),
}


def build_wrapper(
    family: str, seed: int = 0, **sizes: Any
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """(config, model in eval mode, float32) of one of WRAPPERS, all weights perturbed.

    Args:
        family: the model type.
        seed: of the weights.
        sizes: keys of the language model's config.
    """
    text, vision, own = WRAPPERS[family]
    base = transformers.CONFIG_MAPPING[family]
    image = "image_token_index" if hasattr(base, "image_token_index") else "image_token_id"
    keys = {"text_config": TEXT | text | sizes, "vision_config": vision, image: IMAGE, **own}
    if family == "vipllava":
        keys["vision_feature_layers"] = [-1, -2]
    torch.manual_seed(seed)
    config = base(**keys)
    config._attn_implementation = "eager"
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    model = kind(config).float().eval()
    config.architectures = model.config.architectures = [kind.__name__]
    perturb(model)
    return config, model
