"""Quantised models as sources: every number is what the package that quantised it reads.

The weights are packed by the packages themselves. Those that are not installed are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_model import NAMES, Encoded, quantize, save_llama
from helpers.tiny import tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from regraft import load
from regraft.core.checkpoint import Checkpoint

# What the packages say of their own imports is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def need(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plain") / "model")


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors as regraft reads them, by stored name."""
    found = Checkpoint.open(folder)
    return {name: found.tensors[key].read() for key, name in found.names.items()}


def check_numbers(
    plain: Path, out: Path, settings: dict[str, Any], encode: Callable[[str, Tensor], Encoded]
) -> None:
    """Maps that a package has packed are read as it reads them itself."""
    expected = quantize(plain, out, settings, encode)
    values = read(out)
    for name in NAMES:
        assert torch.equal(values[name], expected[name].to(torch.bfloat16)), name
        assert values[name].float().std() > 0.01, name


# What compressed-tensors stores -> (format, settings of its QuantizationArgs).
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{bits} bits, {strategy}, {'symmetric' if symmetric else 'zeros'}": (
        "pack-quantized",
        {"num_bits": bits, "strategy": strategy, "group_size": size, "symmetric": symmetric},
    )
    for bits, strategy, size, symmetric in [
        (4, "group", 32, True),
        (4, "group", 16, False),
        (8, "group", 64, False),
        (4, "channel", None, True),
        (8, "channel", None, False),
        (4, "tensor", None, True),
        (3, "group", 32, False),
        (5, "channel", None, True),
    ]
}
FLOAT = {"num_bits": 8, "type": "float"}
COMPRESSED |= {
    "int8 by rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 by rows, zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8 in groups": ("naive-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "int8, one scale": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "float8 by rows": ("float-quantized", {**FLOAT, "strategy": "channel"}),
    "float8, one scale": ("float-quantized", {**FLOAT, "strategy": "tensor"}),
    "float8 in blocks": (
        "float-quantized",
        {**FLOAT, "strategy": "block", "block_structure": [48, 32]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
    "mxfp8": ("mxfp8-quantized", {**FLOAT, "strategy": "group", "group_size": 32}),
}


def compress(name: str, weight: Tensor, kind: str, options: dict[str, Any]) -> Encoded:
    """A weight with scales of its own, as compressed-tensors packs and unpacks it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**options)
    rows, columns = weight.shape
    block = options.get("block_structure") or [1, 1]
    shape = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": (-(-rows // block[0]), -(-columns // block[1])),
    }.get(options["strategy"], (rows, columns // (options.get("group_size") or columns)))
    largest = {8: 448.0, 4: 6.0}[args.num_bits] if args.type == "float" else 2**args.num_bits / 2
    scale = (torch.rand(shape) + 0.5) * weight.abs().max() / largest
    if kind.startswith("mx"):
        scale = scale.log2().floor().exp2()
    state = {"weight": weight.bfloat16(), "weight_scale": scale.bfloat16()}
    if options["strategy"] == "tensor_group":
        state["weight_global_scale"] = torch.tensor([4.0 / scale.max()])
        state["weight_scale"] = (scale * 4.0 / scale.max()).to(torch.float8_e4m3fn).bfloat16()
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape).to(torch.int8)

    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    base = name.removesuffix(".weight")
    pieces = {f"{base}.{piece}": value for piece, value in stored.items()}
    return pieces, compressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors(scheme, plain, tmp_path):
    need("compressed_tensors")
    kind, options = COMPRESSED[scheme]
    groups = {"group_0": {"targets": ["Linear"], "weights": options}}
    settings = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    torch.manual_seed(0)
    check_numbers(plain, tmp_path / "model", settings, lambda *one: compress(*one, kind, options))


def blocks(name: str, weight: Tensor, kind: str, size: int, nested: bool, store: Any) -> Encoded:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.bfloat16(),
        blocksize=size,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=store,
    )
    told = {f"{name}.{one}": value for one, value in state.as_dict(packed=True).items()}
    return {name: packed, **told}, functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("kind", "size", "store"),
    [("nf4", 64, torch.uint8), ("nf4", 64, torch.bfloat16), ("fp4", 64, torch.float32)],
)
def test_bitsandbytes_in_4_bits(kind, size, store, nested, plain, tmp_path):
    need("bitsandbytes")
    check_numbers(
        plain,
        tmp_path / "model",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda *one: blocks(*one, kind, size, nested, store),
    )


# What loads a plain model as a quantised one -> (package, settings).
def quantizers() -> dict[str, tuple[str, Callable[[], Any]]]:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def ao(kind: str, **options: Any) -> Any:
        import torchao.quantization as quantization

        return TorchAoConfig(getattr(quantization, kind)(**options))

    def groups() -> Any:
        from torchao.quantization.granularity import PerGroup

        return ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))

    return {
        "nf4": (
            "bitsandbytes",
            lambda: BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        ),
        "int8 of bitsandbytes": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
        "int8 of torchao": ("torchao", lambda: ao("Int8WeightOnlyConfig")),
        "float8 of torchao": ("torchao", lambda: ao("Float8WeightOnlyConfig")),
        "int4 in groups of torchao": ("torchao", groups),
    }


@pytest.mark.parametrize("scheme", quantizers())
def test_models_that_transformers_quantises(scheme, plain, tmp_path):
    """Every tensor equals the dequantised one, and the logits are those of the stock model."""
    package, settings = quantizers()[scheme]
    need(package)
    out = tmp_path / "model"
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    quantised = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings(), **options
    )
    quantised.save_pretrained(out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]
    stock = AutoModelForCausalLM.from_pretrained(out, **options)
    values = read(out)
    if package == "bitsandbytes":
        plain_model = stock.dequantize()
        expected = dict(plain_model.state_dict())
    else:
        expected = {
            name: one.dequantize() if type(one) not in (Tensor, nn.Parameter) else one
            for name, one in stock.state_dict().items()
        }
    for name, value in values.items():
        assert torch.equal(value, expected[name].bfloat16()), name

    given = tokens(1, 16, vocab=64)
    mine = load(out)
    with torch.no_grad():
        both = [model(given).logits.float() for model in (mine, quantised)]
    torch.testing.assert_close(*both, rtol=0.1, atol=0.1)
