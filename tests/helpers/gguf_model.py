"""A tiny GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def write_gguf(path: Path, model: torch.nn.Module, config, kinds: dict | None = None) -> dict:
    """A float32 llama GGUF with a byte-level vocabulary of as many tokens as the model has.

    Tensors that `kinds` names are of that quantisation, with random blocks; their numbers are
    given back.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", *[chr(33 + i) for i in range(config.vocab_size - 4)], "!#"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    expected: dict[str, torch.Tensor] = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        value = value.float()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                value = value.view(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        known = names.get_name(name, (".weight",))
        if kind := (kinds or {}).get(name):
            # Small bytes: no half-precision factor among them is NaN or infinite.
            size, block = gguf.GGML_QUANT_SIZES[kind]
            generator = torch.Generator().manual_seed(int(kind))
            shape = (value.shape[0], value.shape[1] // size * block)
            raw = torch.randint(0, 60, shape, generator=generator).to(torch.uint8).numpy()
            expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
            writer.add_tensor(known, raw, raw_dtype=kind)
            continue
        writer.add_tensor(known, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
