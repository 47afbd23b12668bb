"""Quantised models as sources: every number is what the scheme's own formula gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers.cli import refused
from helpers.gguf_model import write_gguf
from helpers.quantized_model import NAMES, Encoded, quantize, save_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from regraft import RegraftError, Widen, check, load
from regraft.core.checkpoint import Checkpoint
from regraft.io.quantized.entry import Found
from regraft.io.quantized.mxfp4 import claim as claim_mxfp4
from regraft.io.quantized.schemes import dequantize
from regraft.io.safetensors import read_entries


def draw(low: int, high: int, shape: Iterable[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, tuple(shape), generator=generator)


def pack_words(rows: Tensor, bits: int) -> Tensor:
    """Integers of each row as one stream of bits in words of 32, the first lowest."""
    count = -(-rows.shape[1] * bits // 32)
    streams = [sum(value << bits * at for at, value in enumerate(row)) for row in rows.tolist()]
    words = [[stream >> 32 * at & (1 << 32) - 1 for at in range(count)] for stream in streams]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def fp8(name: str, weight: Tensor, block: tuple[int, int]) -> Encoded:
    rows, columns = weight.shape
    counts = (-(-rows // block[0]), -(-columns // block[1]))
    scale = torch.rand(counts, generator=torch.Generator().manual_seed(1)) + 0.5
    stored = weight.to(torch.float8_e4m3fn)
    plain = torch.stack(
        [
            stored[row].float() * scale[row // block[0], torch.arange(columns) // block[1]]
            for row in range(rows)
        ]
    )
    return {name: stored, f"{name}_scale_inv": scale}, plain


def fp8_by_rows(name: str, weight: Tensor) -> Encoded:
    scale = torch.rand(len(weight), 1) + 0.5
    stored = weight.to(torch.float8_e4m3fn)
    base = name.removesuffix(".weight")
    extra = {f"{base}.input_scale": torch.ones(1)}
    return {name: stored, f"{name}_scale": scale, **extra}, stored.float() * scale


def fp8_whole(name: str, weight: Tensor) -> Encoded:
    stored, scale = weight.to(torch.float8_e4m3fn), torch.tensor([0.7])
    return {name: stored, f"{name}_scale": scale}, stored.float() * 0.7


def int8(name: str, weight: Tensor) -> Encoded:
    stored = draw(-128, 128, weight.shape).to(torch.int8)
    scale, zero = torch.rand(len(weight), 1), draw(-5, 6, (len(weight), 1)).to(torch.int8)
    pieces = {name: stored, f"{name}_scale": scale, f"{name}_zero_point": zero}
    return pieces, (stored.float() - zero.float()) * scale


def packed(name: str, weight: Tensor, bits: int, zeros: str) -> Encoded:
    rows, columns = weight.shape
    half, groups = 1 << (bits - 1), columns // 32
    numbers = draw(-half, half, weight.shape)
    scale = (torch.rand(rows, groups) + 0.1).to(torch.bfloat16)
    zero = draw(-half, half, (rows, groups), seed=1) if zeros else torch.zeros(rows, groups).int()
    pieces = {
        f"{name}_packed": pack_words(numbers + half, bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor([rows, columns]),
    }
    if zeros == "packed":
        pieces[f"{name}_zero_point"] = pack_words((zero + half).T, bits).T.contiguous()
    elif zeros == "plain":
        pieces[f"{name}_zero_point"] = zero.to(torch.int8)
    group = torch.arange(columns) // 32
    return pieces, (numbers - zero[:, group]).float() * scale.float()[:, group]


def mixed(name: str, weight: Tensor) -> Encoded:
    """Queries in 8 bits with a scale a row, the other map in 4 bits with groups."""
    if "q_proj" not in name:
        return packed(name, weight, 4, "")
    numbers, scale = draw(-128, 128, weight.shape), torch.rand(len(weight), 1) + 0.1
    pieces = {f"{name}_packed": pack_words(numbers + 128, 8), f"{name}_scale": scale}
    return pieces | {f"{name}_shape": torch.tensor(weight.shape)}, numbers.float() * scale


def mxfp8(name: str, weight: Tensor) -> Encoded:
    stored, columns = weight.to(torch.float8_e4m3fn), weight.shape[1]
    exponents = draw(120, 130, (len(weight), columns // 32))
    scale = 2.0 ** (exponents - 127)
    plain = stored.float() * scale[:, torch.arange(columns) // 32]
    return {name: stored, f"{name}_scale": exponents.to(torch.uint8)}, plain


def torchao(name: str, weight: Tensor) -> Encoded:
    base, columns = name.removesuffix(".weight"), weight.shape[1]
    stored, groups = draw(-8, 8, weight.shape), (len(weight), columns // 32)
    scale, zero = torch.rand(groups).bfloat16(), draw(-8, 8, groups, seed=1)
    pieces = {"qdata": stored.to(torch.int8), "scale": scale, "zero_point": zero.to(torch.int8)}
    group = torch.arange(columns) // 32
    plain = (stored - zero[:, group]).float() * scale.float()[:, group]
    return {f"{base}._weight_{piece}": value for piece, value in pieces.items()}, plain


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def nvfp4(name: str, weight: Tensor) -> Encoded:
    numbers = draw(0, 16, weight.shape)
    scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 100).to(torch.float8_e4m3fn)
    whole = torch.tensor([150.0])
    plain = torch.tensor(FP4)[numbers] * (scale.float() / whole).repeat_interleave(16, 1)
    return {
        f"{name}_packed": (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8),
        f"{name}_scale": scale,
        f"{name}_global_scale": whole,
    }, plain


# A one for every number of a word, by bits.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def gptq(name: str, weight: Tensor, bits: int, act_order: bool, version: int) -> Encoded:
    outputs, inputs = weight.shape
    base, groups = name.removesuffix(".weight"), inputs // 32
    numbers = draw(0, 1 << bits, weight.shape)
    zeros = draw(0, 1 << bits, (groups, outputs), seed=1)
    scales = (torch.rand(groups, outputs) + 0.1).half()
    group = torch.arange(inputs) // 32
    if act_order:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(2))]
    pieces = {
        f"{base}.qweight": pack_words(numbers, bits).T.contiguous(),
        # Writers subtract one from all numbers of a word at once.
        f"{base}.qzeros": pack_words(zeros, bits) - (ONES[bits] if version == 1 else 0),
        f"{base}.scales": scales,
    }
    if act_order or version == 2:
        pieces[f"{base}.g_idx"] = group.int()
    return pieces, (numbers - zeros[group].T).float() * scales.float()[group].T


def awq(name: str, weight: Tensor) -> Encoded:
    outputs, inputs = weight.shape
    base, groups = name.removesuffix(".weight"), inputs // 32
    numbers, zeros = draw(0, 16, (inputs, outputs)), draw(0, 16, (groups, outputs), seed=1)
    scales = (torch.rand(groups, outputs) + 0.1).half()

    def pack(rows: Tensor) -> Tensor:
        shuffled = rows.reshape(len(rows), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack_words(shuffled.reshape(len(rows), -1), 4)

    group = torch.arange(inputs) // 32
    pieces = {f"{base}.qweight": pack(numbers), f"{base}.qzeros": pack(zeros)}
    plain = (numbers - zeros[group]).float() * scales.float()[group]
    return pieces | {f"{base}.scales": scales}, plain.T


def four_bits(
    name: str, weight: Tensor, kind: str, nested: bool, storage: torch.dtype = torch.uint8
) -> Encoded:
    table = torch.linspace(-1, 1, 16).sin()
    numbers = draw(0, 16, (weight.numel(),))
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16"}
    state |= {"shape": list(weight.shape)}
    factors = torch.rand(weight.numel() // 64) + 0.1
    pieces: dict[str, Tensor] = {f"{name}.quant_map": table}
    if nested:
        inner, outer = torch.linspace(-1, 1, 256), torch.rand(-(-len(factors) // 256)) + 0.5
        indices = draw(0, 256, (len(factors),), seed=1)
        pieces |= {
            f"{name}.absmax": indices.to(torch.uint8),
            f"{name}.nested_absmax": outer,
            f"{name}.nested_quant_map": inner,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        factors = inner[indices] * outer[torch.arange(len(factors)) // 256] + 0.25
    else:
        pieces[f"{name}.absmax"] = factors
    pieces[name] = (numbers[::2] << 4 | numbers[1::2]).to(torch.uint8).view(storage).reshape(-1, 1)
    text = json.dumps(state).encode()
    pieces[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text)).to(torch.uint8)
    plain = table[numbers] * factors[torch.arange(weight.numel()) // 64]
    return pieces, plain.reshape(weight.shape)


def eight_bits(name: str, weight: Tensor) -> Encoded:
    base, stored = name.removesuffix(".weight"), draw(-127, 128, weight.shape).to(torch.int8)
    largest = torch.rand(len(weight)) + 0.1
    kind = torch.tensor(0, dtype=torch.uint8)
    pieces = {name: stored, f"{base}.SCB": largest, f"{base}.weight_format": kind}
    # As transformers' `dequantize_bnb_weight` has it.
    return pieces, stored * largest.view(-1, 1) * 7.874015718698502e-3


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


def gptq_config(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, **more}


def torchao_config(kind: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": {}}}}


MIXED = compressed("pack-quantized", num_bits=4, group_size=32)
MIXED["config_groups"]["group_1"] = {"weights": {"num_bits": 8, "strategy": "channel"}}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 32]}
# What is quantised -> (quantization_config, what a map becomes).
SCHEMES: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Encoded]]] = {
    "fp8 in blocks": (BLOCKS, lambda name, weight: fp8(name, weight, (48, 32))),
    "fp8 by rows": ({"quant_method": "fbgemm_fp8"}, fp8_by_rows),
    "float8 of compressed-tensors": (compressed("float-quantized", num_bits=8), fp8_by_rows),
    "float8 with one scale": (compressed("float-quantized", num_bits=8), fp8_whole),
    "int8 of compressed-tensors": (compressed("int-quantized", num_bits=8), int8),
    "packed integers": (
        compressed("pack-quantized", num_bits=4, group_size=32),
        lambda name, weight: packed(name, weight, 4, ""),
    ),
    "packed integers with zeros": (
        compressed("pack-quantized", num_bits=8, group_size=32),
        lambda name, weight: packed(name, weight, 8, "packed"),
    ),
    "packed integers with plain zeros": (
        compressed("pack-quantized", num_bits=4, group_size=32),
        lambda name, weight: packed(name, weight, 4, "plain"),
    ),
    "packed integers in 3 bits": (
        compressed("pack-quantized", num_bits=3, group_size=32),
        lambda name, weight: packed(name, weight, 3, "packed"),
    ),
    "packed integers of several sizes": (MIXED, mixed),
    "mxfp8 of compressed-tensors": (compressed("mxfp8-quantized", num_bits=8), mxfp8),
    "nvfp4": (compressed("nvfp4-pack-quantized", num_bits=4, group_size=16), nvfp4),
    "gptq": (gptq_config(4), lambda name, weight: gptq(name, weight, 4, False, 1)),
    "gptq in 2 bits": (gptq_config(2), lambda name, weight: gptq(name, weight, 2, False, 1)),
    "gptq in 3 bits": (
        gptq_config(3, format="gptq_v2"),
        lambda name, weight: gptq(name, weight, 3, True, 2),
    ),
    "gptq of several sizes": (
        gptq_config(4),
        lambda name, weight: gptq(name, weight, 8 if "q_proj" in name else 4, False, 1),
    ),
    "gptq of version 2, with an order": (
        gptq_config(8, desc_act=True, checkpoint_format="gptq_v2"),
        lambda name, weight: gptq(name, weight, 8, True, 2),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda name, weight: four_bits(name, weight, "nf4", False),
    ),
    "fp4 with quantised factors": (
        {"load_in_4bit": True},
        lambda name, weight: four_bits(name, weight, "fp4", True),
    ),
    "nf4 stored as bfloat16": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda name, weight: four_bits(name, weight, "nf4", True, torch.bfloat16),
    ),
    "torchao": (torchao_config("IntxWeightOnlyConfig"), torchao),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes"}, eight_bits),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_are_those_of_the_formula(scheme, plain, tmp_path):
    expected = quantize(plain, tmp_path / "model", *SCHEMES[scheme])
    found = Checkpoint.open(tmp_path / "model")
    assert "quantization_config" not in found.config
    assert [step["step"] for step in found.history] == ["Dequantize"]
    names = {name: key for key, name in found.names.items()}
    for name, value in expected.items():
        lazy = found.tensors[names[name]]
        assert lazy.dtype == torch.bfloat16 and lazy.provenance.kind == "copied"
        assert torch.equal(lazy.read(), value.to(torch.bfloat16)), (scheme, name)


def test_a_quantised_model_grows_and_is_proven(plain, tmp_path, capsys):
    """The source is loaded with the numbers that are grown; the result is a plain model."""
    quantize(plain, tmp_path / "model", *SCHEMES["gptq"])
    Widen(ffn=160)(Checkpoint.open(tmp_path / "model")).save(tmp_path / "grown")
    assert check(tmp_path / "model", tmp_path / "grown")["holds"]
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "grown")
    assert grown.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "grown/config.json").read_text())
    tokens = draw(0, 64, (1, 20))
    with torch.no_grad():
        both = [model.float()(tokens).logits for model in (load(tmp_path / "model"), grown)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_fp8_as_transformers_dequantises_it(kind, tmp_path):
    """Also with exponents as scales, and for experts in one tensor."""
    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    scale = draw(120, 130, (3, 2, 3)).to(kind)
    pieces = {"experts.up": weight, "experts.up_scale_inv": scale}
    save_file(pieces, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    entries = read_entries(tmp_path)
    plain, dropped = dequantize(entries, settings, {"dtype": "bfloat16"}, tmp_path)
    stock = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert set(plain) == {"experts.up"} and not dropped
    assert torch.equal(plain["experts.up"].read(), stock)


def test_mxfp4_as_transformers_dequantises_it(tmp_path):
    pieces = {
        "experts.up_blocks": draw(0, 256, (3, 10, 4, 16)).to(torch.uint8),
        "experts.up_scales": draw(110, 135, (3, 10, 4)).to(torch.uint8),
        "experts.up_bias": torch.ones(3, 10, dtype=torch.bfloat16),
    }
    save_file(pieces, tmp_path / "model.safetensors")
    found = Found(read_entries(tmp_path), {"quant_method": "mxfp4"}, "BF16")
    claim_mxfp4(found)
    assert set(found.entries) == {"experts.up_bias"}
    (entry,) = found.computed.values()
    stock = convert_moe_packed_tensors(pieces["experts.up_blocks"], pieces["experts.up_scales"])
    assert entry.shape == (3, 128, 10) and torch.equal(entry.read(), stock)


def damaged(plain: Path, out: Path, scheme: str, lost: str = "", **changes: Any) -> Path:
    """A quantised model without a piece, or with other settings."""
    settings, encode = SCHEMES[scheme]
    quantize(plain, out, settings | changes, encode)
    values = load_file(out / "model.safetensors")
    kept = {name: value for name, value in values.items() if not lost or not name.endswith(lost)}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


SPARSE = {"sparsity_config": {"format": "sparse-24-bitmask"}}


@pytest.mark.parametrize(
    ("scheme", "damage", "words"),
    [
        ("gptq", {"quant_method": "hqq"}, "is quantised by 'hqq', which is not read"),
        ("gptq", {"bits": 5}, "has 5 bits, which are not read"),
        ("gptq", {"format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"lost": ".scales"}, "has no 'model.layers.0.self_attn.q_proj.scales' beside it"),
        ("awq", {"version": "gemv"}, "has version 'gemv', which is not read"),
        ("nf4", {"lost": ".absmax"}, "q_proj.weight.absmax' beside it"),
        ("fp8 in blocks", {"lost": "_scale_inv"}, "q_proj.weight_scale_inv' beside it"),
        ("nvfp4", {"format": "marlin-24"}, "has the format 'marlin-24', which is not read"),
        ("packed integers", SPARSE, "sparse weights in the format 'sparse-24-bitmask'"),
        ("packed integers", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("torchao", torchao_config("Int4WeightOnlyConfig"), "torchao's 'Int4WeightOnlyConfig'"),
    ],
)
def test_what_is_not_read_is_one_line(scheme, damage, words, plain, tmp_path, capsys):
    folder = damaged(plain, tmp_path / "model", scheme, **damage)
    assert words in refused(capsys, "plan", folder, "--ffn", 160)


def test_pieces_that_do_not_fit_each_other(plain, tmp_path):
    quantize(plain, tmp_path / "model", *SCHEMES["gptq"])
    file = tmp_path / "model" / "model.safetensors"
    values = load_file(file)
    name = NAMES[0].removesuffix("weight") + "scales"
    save_file(values | {name: values[name][:, :-1].contiguous()}, file, {"format": "pt"})
    found = Checkpoint.open(tmp_path / "model")
    with pytest.raises(RegraftError, match=f"cannot compute '{NAMES[0]}'.*fetch the model again"):
        found["attn.q.weight", 0].read()


def test_every_kind_of_gguf_is_read(tmp_path, monkeypatch):
    """A tensor of every quantisation that the gguf package has the numbers of."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    kinds = sorted(gguf.quants._type_traits)
    layers = -(-len(kinds) // 3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
    )
    maps = [f"layers.{i}.mlp.{one}_proj" for i in range(layers) for one in ("gate", "up", "down")]
    names = [f"model.{name}.weight" for name in maps]
    model = LlamaForCausalLM(config)
    chosen = dict(zip(names, kinds, strict=False))
    expected = write_gguf(tmp_path / "tiny.gguf", model, config, chosen)
    assert len(expected) == len(kinds) >= 20

    found = Checkpoint.open(tmp_path / "tiny.gguf")
    keys = {name: key for key, name in found.names.items()}
    for name, value in expected.items():
        assert torch.equal(found.tensors[keys[name]].read(), value), chosen[name]
