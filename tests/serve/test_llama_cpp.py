"""llama.cpp runs what `regraft export` writes: logits beside transformers, argmax, tokenizers.

Needs the extra `serve`; `make serve-test` builds it and runs this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json
from helpers.gguf import (
    VOCAB,
    byte_level_tokenizer,
    save_for_gguf,
    save_hybrid,
    sentencepiece_tokenizer,
)
from helpers.rwkv6qwen2 import make_student
from helpers.tiny import tokens

from regraft import Deepen, Widen, modeling
from regraft.core.checkpoint import Checkpoint
from regraft.export import find_target
from regraft.export.gguf import engine, quantize
from regraft.export.gguf.model import GGUFModel
from regraft.export.gguf.vocabulary import load_tokenizer
from regraft.mixers.remix import Remix

llama_cpp = pytest.importorskip("llama_cpp")

# GELU comes from a table in half precision in llama.cpp: 4e-4 to 8e-4 of the largest logit.
EXACT, GELU = 1e-5, 2e-3
FAMILIES = {
    "llama": EXACT,
    "mistral": EXACT,
    "ministral": EXACT,
    "mixtral": EXACT,
    "qwen2": EXACT,
    "qwen3": EXACT,
    "phi3": EXACT,
    "olmo2": EXACT,
    "granite_swa": EXACT,
    "gemma": GELU,
    "gemma2": GELU,
    "gemma3_text": GELU,
    "phi": GELU,
    "starcoder2": GELU,
    "gpt_neox": GELU,
    "gpt2": GELU,
}


def compare(checkpoint: Checkpoint, folder: Path, length: int = 200) -> engine.EngineEquality:
    """llama.cpp beside the class that transformers has for what was written."""
    made = find_target("gguf").convert(checkpoint)
    file = folder / "model.gguf"
    GGUFModel.of(made).write(file, "f32")
    return engine.compare_engine(
        file, modeling.materialize(made), tokens(1, length, 260), engine.ROUNDED
    )


def assert_equal(found: engine.EngineEquality, bound: float) -> None:
    assert found["argmax"] == found["step_argmax"] == 1, found
    assert max(found["difference"], found["step_difference"]) < bound, found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_for_gguf(tmp_path / family, family))
    assert_equal(compare(checkpoint, tmp_path), FAMILIES[family])


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **keys}}


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", rope("linear", factor=4.0)),
    ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)),
    ("qwen3", {"tie_word_embeddings": True}),
    ("phi3", rope("default", partial_rotary_factor=0.5)),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("starcoder2", {"use_bias": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys"), SETTINGS, ids=str)
def test_settings(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_for_gguf(tmp_path / family, family, **keys))
    assert_equal(compare(checkpoint, tmp_path), FAMILIES[family])


def stir(checkpoint: Checkpoint) -> Checkpoint:
    """Sinks and biases that do something."""
    generator = torch.Generator().manual_seed(3)
    values = {
        name: torch.randn(checkpoint.tensors[key].shape, generator=generator)
        for key, name in checkpoint.names.items()
        if key[0] == "mixer.sinks" or (key[0].startswith("mixer.") and key[0].endswith("bias"))
    }
    reads = {name: (lambda value=value: value) for name, value in values.items()}
    return checkpoint.with_readers(reads, {"step": "Train"})


def test_grown_and_linearized_models(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "llama", tie_word_embeddings=True))
    grown = Deepen(layers=5)(Widen(hidden=48, ffn=64)(source))
    assert_equal(compare(grown, tmp_path), EXACT)
    assert_equal(compare(stir(Remix("sink_window", "1", window=16)(source)), tmp_path), EXACT)


STATES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_5", "llama", {"tie_word_embeddings": True}, {}),
    ("qwen3_5", "llama", {"heads": 4, "kv": 2, "dim": 16}, {"conv": 2, "grouped": True}),
    ("qwen3_5", "llama", rope("linear", factor=4.0), {"conv": 1}),
    ("qwen3_5", "llama", rope("yarn", factor=4.0, original_max_position_embeddings=64), {}),
    ("qwen3_5", "qwen2", {}, {}),
    ("qwen3_5", "qwen3", {}, {}),
    ("granite_hybrid", "llama", {"tie_word_embeddings": True}, {}),
    ("granite_hybrid", "llama", {"heads": 4, "kv": 2, "dim": 6}, {"conv": 2}),
    ("granite_hybrid", "phi3", {"hidden": 36}, {}),
    ("granite_hybrid", "llama", {"attention_bias": True},
     {"layout": "own", "norm": "all", "head_dim": 6, "start": "paper"}),
    ("granite_hybrid", "llama", rope("llama3", factor=8.0, low_freq_factor=1.0,
     high_freq_factor=4.0, original_max_position_embeddings=16), {}),
]  # fmt: skip


@pytest.mark.parametrize(("target", "family", "keys", "options"), STATES, ids=str)
def test_layers_with_states(
    target: str, family: str, keys: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / family, family, **keys))
    chosen = find_target(target).remix
    made = Remix(**chosen | {"options": chosen["options"] | options}, keep="1")(source)
    assert_equal(compare(made, tmp_path), EXACT)


HYBRIDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_5_text", {}),
    ("qwen3_5_text", {"attention_bias": True}),
    ("granitemoehybrid", {}),
    ("granitemoehybrid", {"mamba_conv_bias": False, "position_embedding_type": "nope"}),
]


@pytest.mark.parametrize(("family", "keys"), HYBRIDS, ids=str)
def test_stock_models_with_states(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_hybrid(tmp_path / "model", family, **keys))
    # Random queries and keys are so short that the number added to their lengths shows.
    assert_equal(compare(checkpoint, tmp_path), 5e-5 if "qwen" in family else EXACT)


def test_lengths_with_the_epsilon_of_llama(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "llama", rms_norm_eps=1e-5))
    made = Remix(**find_target("qwen3_5").remix, keep="1")(source)
    assert_equal(compare(made, tmp_path), engine.BOUND)


def test_windows_hold_past_the_ring(tmp_path: Path) -> None:
    """4,096 tokens through a ring of 64: in pieces, and far past its end."""
    source = Checkpoint.open(save_for_gguf(tmp_path / "llama", max_position_embeddings=8192))
    made = find_target("gguf").convert(stir(Remix("sink_window", "1", window=64)(source)))
    file, ids = tmp_path / "model.gguf", tokens(1, 4096, 260)
    GGUFModel.of(made).write(file, "f32")
    with torch.no_grad():
        expected = modeling.materialize(made)(ids, use_cache=False).logits[0]
    model = engine.open_engine(file, 4096 + 64)
    found = engine.read_logits(model, ids[0].tolist(), 64)
    model.close()
    assert (found - expected).abs().max() < EXACT * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


RWKV6: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"grouped": False, "shift": False}),
    ("qwen2", {}),
    ("qwen2", {"decay": "static", "balance": False, "gate": "none"}),
    ("phi3", {"shift_rank": 5, "rank": 7}),
]


@pytest.mark.parametrize(("family", "options"), RWKV6, ids=str)
def test_rwkv6_in_every_layer(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = make_student(tmp_path / "source", family, **options)
    prepare = find_target("rwkv6qwen2").prepare
    assert prepare is not None
    prepare(made).write(tmp_path / "model.gguf", "f32")
    stock, ids = modeling.materialize(made), tokens(1, 200, 260)
    found = engine.compare_engine(tmp_path / "model.gguf", stock, ids, engine.BOUND)
    assert_equal(found, engine.BOUND)


TEXTS = ("a cab  abc", "the naïve\nthing, 123 日本語!", " abacus's\n\n  x", "<eos>a<bos>")


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_tokenizers_are_the_same(make: Any, tmp_path: Path) -> None:
    save_for_gguf(tmp_path / "llama")
    make().save_pretrained(tmp_path / "llama")
    model = GGUFModel.of(Checkpoint.open(tmp_path / "llama"))
    model.write(tmp_path / "model.gguf", "f32")
    tokenizer = load_tokenizer(tmp_path / "llama")
    opened = engine.open_engine(tmp_path / "model.gguf", 64)
    for text in TEXTS:
        expected = tokenizer(text)["input_ids"]
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == expected, text
    opened.close()


@pytest.mark.parametrize("target", ["", "qwen3_5", "granite_hybrid"])
def test_the_command_checks_in_the_engine(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_for_gguf(tmp_path / "llama", hidden=256, heads=8, kv=4, dim=32, ffn=512)
    if target:
        made = Remix(**find_target(target).remix, keep="1")(Checkpoint.open(source))
        made.save(tmp_path / "made")
        source = tmp_path / "made"
    line = ["export", str(source), str(tmp_path / "out"), "--check-engine"]
    found = as_json(capsys, *line, "--quantize", "q4_k_m", "--to", "gguf")
    assert found["engine"]["argmax"] == 1
    for kind in ("f32", *quantize.KINDS[1:]):
        model = engine.open_engine(tmp_path / "out" / f"model-{kind}.gguf", 64)
        assert model.n_vocab() == VOCAB
        model.close()
