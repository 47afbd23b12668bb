"""Tiny random models of every family, with nothing hidden by ones and zeros; one that can read and
write on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "ministral": "MinistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gpt_neox": "GPTNeoXConfig",
    "gpt2": "GPT2Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "olmo2": "Olmo2Config",
    "starcoder2": "Starcoder2Config",
    "mixtral": "MixtralConfig",
    "granite_swa": "GraniteSWAConfig",
    "phi": "PhiConfig",
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "vit": "ViTConfig",
    "dinov2": "Dinov2Config",
}
GROWABLE = tuple(CONFIGS)
# Classes of the encoders, the default first; the others are AutoModelForCausalLM's.
ARCHITECTURES = {
    "bert": (
        "BertForMaskedLM",
        "BertModel",
        "BertForSequenceClassification",
        "BertForPreTraining",
        "BertForNextSentencePrediction",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaModel",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
    ),
    "vit": ("ViTForImageClassification", "ViTModel"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone"),
}
# Both kinds of layers in three, and numbers that differ from what the sizes would give.
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 16}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
EXTRA: dict[str, dict[str, Any]] = {
    "ministral": {"sliding_window": 16, "layer_types": LAYER_TYPES},
    "mistral": {"sliding_window": 40},  # its default of 4096 makes checks long
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": LAYER_TYPES},
    "mixtral": {"num_local_experts": 3},
    "granite_swa": {
        "sliding_window": 16,
        "layer_types": LAYER_TYPES,
        "tie_word_embeddings": False,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.4,
    },
    "bert": {"max_position_embeddings": 41, "num_labels": 5},
    "roberta": {"max_position_embeddings": 41, "num_labels": 5},
    "vit": {"image_size": 15, "patch_size": 5, "num_labels": 7},
    "dinov2": {"image_size": 15, "patch_size": 5, "num_labels": 7},
}


def sizes_of(
    family: str, hidden: int, heads: int, kv: int, dim: int, ffn: int, layers: int, vocab: int
) -> dict[str, Any]:
    """Config keys, as near to the asked sizes as the class allows."""
    if family == "gpt2":
        return {
            "n_embd": heads * dim,
            "n_head": heads,
            "n_inner": ffn,
            "n_layer": layers,
            "n_positions": 512,
            "vocab_size": vocab,
        }
    common = {
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    if family in ("gpt_neox", "bert", "roberta"):
        return common | {"hidden_size": heads * dim}
    if family in ("vit", "dinov2"):
        del common["vocab_size"]
        common |= {"hidden_size": hidden, "head_dim": dim}
        return common | (
            {"mlp_ratio": -(-common.pop("intermediate_size") // hidden)}
            if family == "dinov2"
            else {}
        )
    if family == "mixtral":
        hidden = -(-hidden // 8) * 8
        common["intermediate_size"] = -(-ffn // 8) * 8
    return common | {"hidden_size": hidden, "num_key_value_heads": kv, "head_dim": dim}


def tiny(
    family: str,
    *,
    hidden: int = 36,
    heads: int = 9,
    kv: int = 3,
    dim: int = 8,
    ffn: int = 52,
    layers: int = 3,
    vocab: int = 97,
    seed: int = 0,
    architecture: str | None = None,
    **keys: Any,
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """(config, model in eval mode, float32) of `family`: odd sizes by default, biases, gains and
    maps all perturbed.

    9 query heads over 3 key/value heads and heads * dim != hidden where the family allows it;
    gpt_neox, gpt2, bert and roberta get hidden = heads * dim, mixtral the next multiples of 8,
    dinov2 the next multiple of hidden as ffn. `architecture` is the class of an encoder, one of
    ARCHITECTURES. `keys` are further config keys, such as `tie_word_embeddings=True` or
    `attention_bias=True`.
    """
    torch.manual_seed(seed)
    sizes = sizes_of(family, hidden, heads, kv, dim, ffn, layers, vocab)
    extra = dict(EXTRA.get(family, {}))
    if layers != len(LAYER_TYPES):
        extra.pop("layer_types", None)
    if (architecture or "").endswith("ForQuestionAnswering"):
        extra["num_labels"] = 2  # where an answer begins and ends
    special = (
        {}
        if "vocab_size" not in sizes
        else {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    config = getattr(transformers, CONFIGS[family])(**(sizes | special | extra | keys))
    if family in ARCHITECTURES:
        model = getattr(transformers, architecture or ARCHITECTURES[family][0])(config).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config.architectures = model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                start = 0.0 if name.endswith("bias") or family.startswith("gemma") else 1.0
                parameter.copy_(start + 0.3 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)
    return config, model


def tokens(rows: int, length: int, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length), none of them special."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(config: PreTrainedConfig, rows: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """What `model(**inputs)` takes: token ids (rows, 23), or pixels (rows, channels, side, side)."""
    if hasattr(config, "image_size"):
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if not hasattr(config, "mask_ratio"):
            return {"pixel_values": pixels}
        patches = (config.image_size // config.patch_size) ** 2
        return {"pixel_values": pixels, "noise": pixels[:, 0].flatten(1)[:, :patches]}
    if hasattr(config, "frequency_stride"):
        shape = (rows, config.max_length, config.num_mel_bins)
        return {"input_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}
    ids = tokens(rows, 23, config.vocab_size, seed)
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    decoder = {"decoder_input_ids": ids[:, :17]}
    if hasattr(config, "num_mel_bins"):
        shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
        generator = torch.Generator().manual_seed(seed)
        return decoder | {"input_features": torch.randn(shape, generator=generator)}
    return decoder | {"input_ids": ids.roll(1, 1)}


@torch.no_grad()
def outputs(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor a model gives, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model(**given).items():
        if torch.is_tensor(value) and value.ndim:
            found[name] = value
        elif name == "feature_maps":
            found |= {f"{name}.{index}": item for index, item in enumerate(value)}
    return found


def max_relative_difference(before: torch.Tensor, after: torch.Tensor, axis: int = -1) -> float:
    """max |difference| / max |before|. Where the hidden width itself comes out, wider than it was,
    every block of its old size holds the old values or, with new coordinates that are silent,
    zeros.
    """
    if before.shape != after.shape:
        width = before.shape[axis]
        blocks = after.split(width, axis)
        worst = [max_relative_difference(before, blocks[0], axis)]
        for block in blocks[1:]:
            same = before.narrow(axis, 0, block.shape[axis])
            worst.append(
                min(
                    max_relative_difference(same, block, axis),
                    float(block.abs().max() / before.abs().max()),
                )
            )
        return max(worst)
    return float((before - after).abs().max() / before.abs().max())


SPECIAL = ("<pad>", "<bos>", "<eos>")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 0 pad, 1 bos, 2 eos."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT
    )


def save_model(path: Path, family: str = "llama", layers: int = 4, seed: int = 0) -> Path:
    """Write the model and its tokenizer; returns the path."""
    _, model = tiny(family, layers=layers, vocab=len(SPECIAL) + 256, seed=seed)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_text(path: Path, documents: int = 6, words: int = 120) -> Path:
    """Some text with structure, UTF-8 beyond ASCII included."""
    sentence = "the quick brown fox naïvely jumps over one lazy dog; "
    parts = [f"Document {number}. " + sentence * (words // 10) for number in range(documents)]
    path.write_text("\n\n\n".join(parts), encoding="utf-8")
    return path


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
