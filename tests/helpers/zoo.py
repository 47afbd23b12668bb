"""Tiny random models of every family, a few keys each: for laws that take one case a family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
S, F = "sliding_attention", "full_attention"
WINDOWS: dict[str, Any] = {"layer_types": [S, F, S], "sliding_window": 16}
# Of classes whose hidden size is the number of heads times that of a head.
COUPLED: dict[str, Any] = {"hidden_size": 32, "head_dim": None}
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.4,
}
LOCAL: dict[str, Any] = {"num_local_experts": 3}
# Model type -> what differs from SIZES; a key of None is left out.
DECODERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": COUPLED,
    "cohere": {},
    "cohere2": WINDOWS,
    "cwm": WINDOWS,
    "ernie4_5": {"use_bias": True},
    "exaone4": WINDOWS,
    "glm": {},
    "glm4": {},
    "gpt_neo": COUPLED
    | {"attention_types": [[["local"], 1], [["global", "local"], 1]], "window_size": 9},
    "gptj": COUPLED | {"rotary_dim": 4},
    "gpt_oss": WINDOWS | LOCAL | {"num_experts_per_tok": 2},
    "granite": GRANITE,
    "granitemoe": GRANITE | LOCAL,
    "helium": COUPLED | {"head_dim": 8},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "lfm2": {
        "layer_types": ["conv", F, "conv"],
        "block_multiple_of": 20,
    },
    "ministral3": {},
    "mixtral": LOCAL | {"head_dim": None},
    "mpt": COUPLED,
    "nemotron": {},
    "olmo": {},
    "olmo3": WINDOWS,
    "olmoe": COUPLED | EXPERTS,
    "opt": COUPLED | {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "qwen2_moe": COUPLED
    | EXPERTS
    | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "intermediate_size": 28},
    "qwen3_moe": EXPERTS | {"mlp_only_layers": [1], "intermediate_size": 28},
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": COUPLED,
}
PIXELS: dict[str, Any] = {"image_size": 15, "patch_size": 5, "num_labels": 7}
# Keys that a class reads, but does not declare.
READ_BY_NAME = ("position_buckets", "norm_rel_ebd", "share_att_key")
# Model type -> (its classes, what differs from SIZES).
ENCODERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "camembert": (("CamembertForMaskedLM", "CamembertForSequenceClassification"), COUPLED),
    "deit": (("DeiTForImageClassificationWithTeacher", "DeiTModel"), PIXELS),
    "dinov2_with_registers": (
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        PIXELS,
    ),
    "dinov3_vit": (("DINOv3ViTModel",), COUPLED | PIXELS | {"num_register_tokens": 2}),
    "distilbert": (
        ("DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
        COUPLED | {"hidden_dim": 24},
    ),
    "albert": (
        ("AlbertForMaskedLM", "AlbertForPreTraining", "AlbertForSequenceClassification"),
        COUPLED | {"embedding_size": 20},
    ),
    "beit": (
        ("BeitForImageClassification",),
        COUPLED | PIXELS | {"use_relative_position_bias": True, "use_mask_token": True},
    ),
    "clip_text_model": (("CLIPTextModelWithProjection", "CLIPTextModel"), COUPLED),
    "clip_vision_model": (("CLIPVisionModelWithProjection", "CLIPVisionModel"), COUPLED | PIXELS),
    "eurobert": (("EuroBertForMaskedLM", "EuroBertForSequenceClassification"), {}),
    "siglip_text_model": (("SiglipTextModel",), COUPLED),
    "siglip_vision_model": (("SiglipVisionModel",), COUPLED | PIXELS),
    "deberta-v2": (
        ("DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification"),
        COUPLED
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    "electra": (
        ("ElectraForMaskedLM", "ElectraForPreTraining", "ElectraForSequenceClassification"),
        COUPLED | {"embedding_size": 20},
    ),
    "audio-spectrogram-transformer": (
        ("ASTForAudioClassification", "ASTModel"),
        COUPLED
        | {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 21}
        | {"num_mel_bins": 11, "num_labels": 7},
    ),
    "vit_mae": (
        ("ViTMAEForPreTraining", "ViTMAEModel"),
        COUPLED
        | PIXELS
        | {"mask_ratio": 0.6, "decoder_hidden_size": 20, "decoder_num_attention_heads": 2}
        | {"decoder_intermediate_size": 28, "decoder_num_hidden_layers": 2},
    ),
    "esm": (
        ("EsmForMaskedLM", "EsmForSequenceClassification", "EsmForTokenClassification"),
        COUPLED | {"emb_layer_norm_before": True},
    ),
    "nomic_bert": (
        ("NomicBertForMaskedLM", "NomicBertForSequenceClassification", "NomicBertModel"),
        {"hidden_size": 32},
    ),
    "ernie": (("ErnieForMaskedLM", "ErnieForPreTraining"), COUPLED | {"use_task_id": True}),
    "ijepa": (("IJepaModel", "IJepaForImageClassification"), COUPLED | PIXELS),
    "vit_msn": (("ViTMSNModel", "ViTMSNForImageClassification"), COUPLED | PIXELS),
    "modernbert": (
        ("ModernBertForMaskedLM", "ModernBertForTokenClassification"),
        COUPLED | {"layer_types": [F, S, F], "local_attention": 16},
    ),
    "mpnet": (("MPNetForMaskedLM", "MPNetModel"), COUPLED),
    "xlm-roberta": (("XLMRobertaForMaskedLM", "XLMRobertaForTokenClassification"), COUPLED),
}
# Model type -> (its class, keys of its text tower, keys of its image tower), which differ in sizes.
TWO_TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip": ("CLIPModel", COUPLED, COUPLED | PIXELS | {"intermediate_size": 28}),
    "siglip": ("SiglipModel", COUPLED | {"projection_size": 32}, COUPLED | PIXELS),
}
# What encoder-decoders call the sizes; the encoder is deeper than the decoder.
STACKS: dict[str, Any] = COUPLED | {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 19,
    "max_target_positions": 30,
    "num_mel_bins": 6,
    "scale_embedding": True,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "hidden_size": None,
}
T5: dict[str, Any] = STACKS | {
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "d_kv": 12,
    "d_ff": 24,
}
# Model type -> (its class, what differs from SIZES).
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", STACKS),
    "blenderbot": ("BlenderbotForConditionalGeneration", STACKS),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", STACKS),
    "m2m_100": ("M2M100ForConditionalGeneration", STACKS),
    "marian": ("MarianMTModel", STACKS),
    "mbart": ("MBartForConditionalGeneration", STACKS),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "pegasus": ("PegasusForConditionalGeneration", STACKS),
    "plbart": ("PLBartForConditionalGeneration", STACKS),
    "t5": ("T5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "whisper": ("WhisperForConditionalGeneration", STACKS | {"scale_embedding": False}),
}


def build(
    family: str, seed: int = 0, architecture: str | None = None, **keys: Any
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """(config, model in eval mode, float32), whose gains, biases and maps are all perturbed.

    Args:
        family: a model type of DECODERS, ENCODERS or SEQ2SEQ.
        seed: of the weights.
        architecture: class of an encoder.
        keys: further config keys.
    """
    torch.manual_seed(seed)
    given = SIZES | find_keys(family) | keys
    kind = transformers.CONFIG_MAPPING[family]
    known = {*dir(kind), *kind.attribute_map, "head_dim", "num_labels", *READ_BY_NAME}
    given = {key: value for key, value in given.items() if key in known}
    config = kind(**{key: value for key, value in given.items() if value is not None})
    if family in SEQ2SEQ:
        model = getattr(transformers, SEQ2SEQ[family][0])(config).eval()
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer))
    elif family in ENCODERS:
        model = getattr(transformers, architecture or ENCODERS[family][0][0])(config).eval()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.architectures = model.config.architectures = [type(model).__name__]
    perturb(model)
    return config, model


def find_keys(family: str) -> dict[str, Any]:
    """What the config of a tiny model of a family has other than SIZES."""
    cases = {**ENCODERS, **SEQ2SEQ}
    return DECODERS.get(family) or (cases[family][1] if family in cases else {})


def build_towers(family: str, seed: int = 0) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """(config, model in eval mode, float32) of one of TWO_TOWERS, all weights perturbed."""
    kind, *keys = TWO_TOWERS[family]
    base = transformers.CONFIG_MAPPING[family]
    towers = {}
    for tower, own in zip(("text", "vision"), keys, strict=True):
        known = dir(transformers.CONFIG_MAPPING[f"{family}_{tower}_model"])
        given = {key: value for key, value in (SIZES | own).items() if key in known}
        towers[f"{tower}_config"] = {
            key: value for key, value in given.items() if value is not None
        }
    torch.manual_seed(seed)
    config = base(**towers)
    model = getattr(transformers, kind)(config).eval()
    config.architectures = model.config.architectures = [kind]
    perturb(model)
    model.logit_scale.data.fill_(2.0)  # scores far from zero, beside which roundings are small
    return config, model


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Change every weight of a model, so that nothing is hidden by ones and zeros."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and bool(parameter.any()):
            parameter.mul_(5.0)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
