"""Qwen3.5's class: heads that its norm leaves alone, stored dtypes, the way there and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.mixers import QWEN35, made, relative
from helpers.tiny import save_model, tiny, tokens, write_text
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from regraft import Deepen, Widen, modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import equality, find_target
from regraft.export.step import Export
from regraft.export.targets.qwen3_5 import OPTIONS, widen_heads
from regraft.growth.sizes_to_steps import cast_checkpoint
from regraft.mixers.attention import Attention
from regraft.mixers.base import MixerContext
from regraft.mixers.gated_deltanet import HALF_LIVES
from regraft.mixers.remix import Remix
from regraft.train.calibrate import calibrate, output_error
from regraft.train.fit_mixer import invert_silu
from regraft.train.hooks import LayerRecord, record_layers, run_decoder

EXPORT = Export("qwen3_5")


def student(keep: str, **options: Any) -> Remix:
    return Remix("gated_deltanet", keep, window=0, options=OPTIONS | options)


@torch.no_grad()
def difference(before: Checkpoint, after: Checkpoint, length: int = 60) -> float:
    ids = tokens(2, length)
    expected = modeling.materialize(before)(ids).logits
    return float((modeling.materialize(after)(ids).logits - expected).abs().max() / expected.max())


@torch.no_grad()
def test_the_mixer_is_the_stock_layer() -> None:
    attention = Attention(hidden=20, kv=2, group=2, dim=6, scale=0.4)
    mixer = made({"name": "gated_deltanet", "eps": 1e-3} | QWEN35, attention)
    config = Qwen3_5TextConfig(
        hidden_size=20, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=6,
        linear_value_head_dim=6, rms_norm_eps=1e-3,
    )  # fmt: skip
    stock = Qwen3_5GatedDeltaNet(config, 0)
    parts = [(getattr(mixer, f"{name}_proj"), getattr(mixer, f"conv_{name}")) for name in "qkv"]
    weights = {
        "in_proj_qkv.weight": torch.cat([layer.weight for layer, _ in parts]),
        "conv1d.weight": torch.cat([conv.weight.flatten(0, 1) for _, conv in parts])[:, None],
        "in_proj_z.weight": mixer.gate.weight,
        "in_proj_b.weight": mixer.beta.weight,
        "in_proj_a.weight": mixer.decay.weight,
        "dt_bias": mixer.decay.bias,
        "A_log": mixer.rate,
        "norm.weight": mixer.norm,
        "out_proj.weight": mixer.o_proj.weight,
    }
    stock.load_state_dict(weights)
    x = torch.randn(2, 37, 20)
    assert relative(mixer(x, MixerContext())[0], stock(x)) < 1e-5


@pytest.mark.parametrize("dim", [2, 8, 12, 16, 64, 96, 128])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
def test_constants_and_gains_are_numbers_of_short_floats(dim: int, scale: float) -> None:
    wide = widen_heads(Attention(hidden=20, kv=2, group=2, dim=dim, scale=scale))
    numbers = torch.tensor([wide.constant, wide.q_gain, wide.k_gain], dtype=torch.float64)
    for short in (torch.bfloat16, torch.float16):
        assert torch.equal(numbers.to(short).double(), numbers)
    divisor = wide.constant**2 * (wide.width - dim) / wide.width
    product = (1 + wide.q_gain) * (1 + wide.k_gain) / divisor
    assert wide.width % 16 == 0 and wide.width > dim
    assert abs(product / (scale * wide.width**0.5) - 1) < 1e-5


@torch.no_grad()
def test_the_closed_form_sets_half_lives_and_how_large_heads_are(tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    teacher, model = (modeling.materialize(one) for one in (source, student("0")(source)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, positions = tokens(4, 64), torch.arange(64).expand(4, -1)
    slots, records = modeling.slots(teacher, source), list[LayerRecord]()
    with record_layers(slots, [1], lambda layer, record: records.append(record)):
        run_decoder(teacher, ids, positions)
    errors = []
    for _ in range(2):
        mixer = model.slots()[1].mixer
        errors.append(float(output_error(mixer, records[0], MixerContext())))
        list(calibrate(model.slots(), teacher, slots, [(ids, positions, None)]))
    assert errors[1] < min(errors[0], 0.9)  # 1 is silence
    halved = math.log(2) / torch.nn.functional.softplus(mixer.decay.bias)
    assert (halved[:, None] / torch.tensor(HALF_LIVES) - 1).abs().amin(1).max() < 1e-4
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    local = {name.partition("mixer.")[2] for name in changed}
    assert local == {"decay.bias", "gate.weight", "o_proj.weight"}


def test_silu_is_inverted() -> None:
    wanted = torch.logspace(-2, 1, 40, dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.silu(invert_silu(wanted)), wanted)


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **keys}}


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", {"rms_norm_eps": 1e-2, "dim": 12, "kv": 9}),
    ("qwen3", {"attention_bias": True, "rms_norm_eps": 1e-3, "dim": 12}),
    ("llama", rope("linear", factor=4.0)),
    ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    (
        "llama",
        rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys"), SETTINGS, ids=str)
def test_settings_are_held(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    tiny(family, **keys)[1].save_pretrained(tmp_path)
    before = student("0")(Checkpoint.open(tmp_path))
    assert difference(before, EXPORT(before)) < equality.BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_short_floats_are_held(family: str, dtype: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    before = student("1")(cast_checkpoint(Checkpoint.open(tmp_path), dtype))
    after = EXPORT(before)
    assert str(after["attn.q.weight", 1].dtype) == f"torch.{dtype}"
    assert difference(before, after) < equality.BOUND


def test_grown_models_are_held(tmp_path: Path) -> None:
    tiny("qwen2", layers=2)[1].save_pretrained(tmp_path)
    grown = Deepen(layers=3)(Widen(hidden=72, ffn=60)(Checkpoint.open(tmp_path)))
    assert difference(grown, EXPORT(grown)) < equality.BOUND


REFUSED: list[tuple[str, dict[str, Any], Remix | None, str]] = [
    ("llama", {}, Remix("gated_deltanet", "0"), "gated_deltanet beside a window.*--for qwen3_5"),
    ("llama", {}, Remix("gated_deltanet", "0", window=0), "has rotary True, the class False"),
    ("llama", {}, Remix("retnet", "0", window=0), "layer 1 has the mixer retnet: linearize with"),
    ("llama", {}, student("0", eps=1e-2), "has eps 0.01, the class 1e-06"),
    ("llama", {}, student("0", conv=0), "has conv 0, the class 1 or more"),
    ("qwen3", {}, student("0", qk_norm=True), "has qk_norm True, the class False"),
    ("qwen2", {}, student("0", biases=True), "has biases True, the class False"),
    ("llama", {}, student("none"), "no layer has softmax attention.*--keep 0"),
    ("mistral", {}, student("0"), "layer 0 has attention over the last 40 tokens.*--keep none"),
    ("llama", {"mlp_bias": True}, None, "its MLP has biases"),
    ("llama", {"hidden_act": "gelu"}, None, "hidden_act is gelu, not silu"),
    ("olmo2", {}, None, "olmo2 has"),
]


@pytest.mark.parametrize(("family", "keys", "remix", "reason"), REFUSED, ids=str)
def test_a_refusal_names_what_does_not_fit(
    family: str, keys: dict[str, Any], remix: Remix | None, reason: str, tmp_path: Path
) -> None:
    tiny(family, **keys)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    with pytest.raises(RegraftError, match=reason):
        EXPORT(remix(source) if remix else source)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer, a text, what `linearize --for` makes of them, and its export."""
    from regraft.cli.main import main

    place = tmp_path_factory.mktemp("served")
    save_model(place / "source")
    write_text(place / "text.txt", documents=3)
    given = f"--data {place}/text.txt --length 32 --keep every:2 --tokens 128"
    line = f"linearize {place}/source {place}/linear --for qwen3_5 {given} --json"
    assert main(line.split()) == 0
    assert main(f"export {place}/linear {place}/out --to qwen3_5 --json".split()) == 0
    return place


@torch.no_grad()
def test_stock_save_pretrained_keeps_what_is_served(folders: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / "out", dtype=torch.float32)
    assert type(model) is Qwen3_5ForCausalLM
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens(2, 50)
    assert torch.equal(model(ids).logits, again(ids).logits)
    ours = modeling.materialize(Checkpoint.open(tmp_path))
    assert torch.equal(model(ids).logits, ours(ids).logits)


def test_regraft_checks_and_refuses_to_change_it(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "check", str(folders / "linear"), str(folders / "out"))
    assert found["holds"] and found["unequal"] == []
    served = Checkpoint.open(folders / "out")
    assert find_target("qwen3_5").find_misfits(served.config)[0].startswith("it is one already")
    again = Remix(keep="none")(served).config  # what is softmax still can be linearized
    kinds = [kind == "full_attention" for kind in served.config["layer_types"]]
    assert [spec is not None for spec in again["mixers"]] == kinds
    with pytest.raises(RegraftError, match="cannot grow its kv .the gate of each head is packed"):
        Widen(heads=2 * served.sizes["kv"] * served.sizes["group"])(served)


def test_flags_stand_before_the_targets_options(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", str(folders / "source"), "--for", "qwen3_5", "--options", '{"conv": 2}')
    assert as_json(capsys, *words)["for"]["misfits"] == []
    line = ("linearize", str(folders / "source"), str(folders / "no"), "--for", "qwen3_5")
    assert "beside a window" in refused(capsys, *line, "--window", "8")
