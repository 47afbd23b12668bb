"""Int8 weights: the product, what a whole model computes, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.remixes import BESIDE, REMIXES
from helpers.tiny import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.evaluation import bench, verified
from regraft.mixers.int8 import FEW, LARGEST, Int8Linear
from regraft.modeling.quantize import quantize_linears
from regraft.modeling.speculative import decoding_bytes

HALF = 2**-8  # of bfloat16: the largest error of rounding, relative


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL of logits (batch, time, vocab)."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1,), (2, 1), (3, FEW), (FEW + 1,), (0,)]),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_product_with_its_weights(
    shape: tuple[int, ...], sizes: tuple[int, int], bias: bool, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*sizes, bias=bias)
    layer.weight.data *= scale
    layer.weight.data[0] = 0  # an output that nothing reaches
    quantized, x = Int8Linear.of(layer), torch.randn(*shape, sizes[0])
    # Half a step of each output's own grid, and the rounding of its scale to bfloat16.
    step = layer.weight.abs().amax(1, keepdim=True) / LARGEST
    error = (quantized.weight - layer.weight).abs()
    assert (error <= step * (0.5 + LARGEST * HALF) * (1 + 1e-5)).all()
    assert not quantized.weight[0].any()

    with torch.no_grad():
        out = quantized(x)
    expected = nn.functional.linear(x, quantized.weight, layer.bias)
    size = x.abs() @ quantized.weight.abs().t() + (0 if layer.bias is None else layer.bias.abs())
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert ((out - expected).abs() <= 3 * HALF * size + 1e-30).all()


@pytest.mark.parametrize("name", REMIXES | BESIDE)
@torch.no_grad()
def test_every_mixer_reads_int8_weights(name: str, source: Path) -> None:
    """In one pass it is the model with weights rounded alike, by steps nearly so."""
    model = modeling.materialize((REMIXES | BESIDE)[name](Checkpoint.open(source)))
    quantized, rows = copy.deepcopy(model), tokens(2, 24, 259)
    quantize_linears(quantized)
    for path, layer in quantized.named_modules():
        if isinstance(layer, Int8Linear):
            model.get_submodule(path).weight.copy_(layer.weight)
    expected = model(rows).logits
    assert torch.equal(expected, quantized(rows).logits)

    quantized.prepare_decoding(2)
    cache = DynamicCache(config=quantized.config)
    steps = [
        quantized(part, use_cache=True, **modeling.cache_kwargs(cache)).logits
        for part in rows.split((12, *[1] * 12), 1)
    ]
    assert divergence(expected, torch.cat(steps, 1)) < 1e-3
    assert torch.equal(expected, quantized(rows).logits)
    assert decoding_bytes(quantized) < 0.7 * decoding_bytes(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3", "phi"])
def test_stock_classes_read_int8_weights(family: str) -> None:
    _, model = tiny(family)
    rows = tokens(2, 30)
    with torch.no_grad():
        expected = model(rows).logits
        head = model.get_output_embeddings().weight.clone()
        quantize_linears(model)
        assert divergence(expected, model(rows).logits) < 0.01
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    with pytest.raises(RegraftError, match="no linear layer beside its head"):
        quantize_linears(model)


def test_int8_weights_are_neither_saved_nor_trained(source: Path, tmp_path: Path) -> None:
    model = modeling.load(source, torch.int8)
    with pytest.raises(ValueError, match="int8 for decoding and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert not model.hf_quantizer.is_trainable


def test_commands_take_a_dtype(source: Path, linearized: Path, capsys: Any) -> None:
    words = ["generate", linearized, "the quick brown fox", "--tokens", 8]
    own = as_json(capsys, *words)["text"]
    for dtype in ("bfloat16", "int8"):
        assert as_json(capsys, *words, "--dtype", dtype)["tokens"] == 8
    # Whatever drafts, the text is the source's.
    alone = as_json(capsys, "generate", source, *words[2:])["text"]
    assert as_json(capsys, *words, "--dtype", "int8", "--verify", source)["text"] == alone

    evaluation = ["eval", linearized, "--baseline", source, "--windows", 2, "--length", 64]
    rows = as_json(capsys, *evaluation, "--dtype", "int8")
    plain = as_json(capsys, *evaluation)
    assert rows["baselines"]["teacher"]["perplexity"] == plain["baselines"]["teacher"]["perplexity"]
    assert rows["perplexity"] != plain["perplexity"]
    assert rows["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)

    row = bench.measure(str(linearized), 32, 2, dtype="int8")
    drafted = verified.measure_verified(str(linearized), str(source), "int8", 32, 8)
    assert row["decode_tok_s"] and drafted["tokens"] == 8

    benched = ["bench", linearized, "--lengths", "32", "--against", source]
    for verb in (words, evaluation, benched):
        line = refused(capsys, *verb, "--dtype", "int4")
        assert "int4" in line and "float32, bfloat16, float16, int8" in line
    assert own
