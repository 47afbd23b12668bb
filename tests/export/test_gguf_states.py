"""GGUF files of classes with a state in some layers: what is in them and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json
from helpers.gguf import hybrid, save_for_gguf, save_hybrid

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import equality, find_target
from regraft.export.gguf import fit, read_back
from regraft.export.gguf.model import GGUFModel
from regraft.export.gguf.writer import read_tensors
from regraft.mixers.remix import Remix

gguf = pytest.importorskip("gguf")


def linearize(target: str, source: Checkpoint, **keys: Any) -> Checkpoint:
    return Remix(**find_target(target).remix, keep="1", **keys)(source)


def write(model: GGUFModel, file: Path, kind: str = "f32") -> dict[str, torch.Tensor]:
    """A file's tensors, all as they were to be written."""
    model.write(file, kind)
    read_back.compare_tensors(file, model.tensors, None if kind == "f32" else kind.upper())
    return read_tensors(file)


def shapes(file: Path, layer: int) -> dict[str, list[int]]:
    """By name, the shapes of a layer's tensors in PyTorch's order."""
    start = f"blk.{layer}."
    found = gguf.GGUFReader(file).tensors
    return {
        one.name.removeprefix(start): one.shape.tolist()[::-1]
        for one in found
        if one.name.startswith(start)
    }


def fields(file: Path) -> dict[str, Any]:
    return {key: one.contents() for key, one in gguf.GGUFReader(file).fields.items()}


def test_gated_delta_layers_go_to_qwen35(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source"))
    model = GGUFModel.of(find_target("gguf").convert(linearize("qwen3_5", source)))
    file = tmp_path / "model.gguf"
    stored, found = write(model, file), fields(file)
    assert shapes(file, 0) == {
        "attn_norm.weight": [36],
        "attn_qkv.weight": [216, 36],
        "attn_gate.weight": [72, 36],
        "ssm_alpha.weight": [9, 36],
        "ssm_beta.weight": [9, 36],
        "ssm_conv1d.weight": [216, 4],
        "ssm_dt.bias": [9],
        "ssm_a": [9],
        "ssm_norm.weight": [8],
        "ssm_out.weight": [36, 72],
        "post_attention_norm.weight": [36],
        "ffn_gate.weight": [52, 36],
        "ffn_up.weight": [52, 36],
        "ffn_down.weight": [36, 52],
    }
    assert "attn_k.bias" in shapes(file, 1) and "attn_output.bias" not in shapes(file, 1)
    rate = model.checkpoint["delta.rate", 0].read()
    assert torch.equal(stored["blk.0.ssm_a"], -rate.exp())
    gain = source["norm.attn.weight", 0].read()
    assert torch.allclose(stored["blk.0.attn_norm.weight"], gain, atol=1e-6)
    assert found["qwen35.attention.recurrent_layers"] == [True, False, True]
    # Four frequencies of a head's first eight coordinates.
    assert found["qwen35.rope.dimension_count"] == 8
    assert found["qwen35.rope.dimension_sections"] == [2, 1, 1, 0]


def test_mamba_2_layers_go_to_granitehybrid(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source"))
    model = GGUFModel.of(find_target("gguf").convert(linearize("granite_hybrid", source)))
    file = tmp_path / "model.gguf"
    stored, found = write(model, file), fields(file)
    assert shapes(file, 0) == {
        "attn_norm.weight": [36],
        "ssm_in.weight": [4 * 72 + 9, 36],
        "ssm_conv1d.weight": [3 * 72, 4],
        "ssm_conv1d.bias": [3 * 72],
        "ssm_dt.bias": [9],
        "ssm_a": [9, 1],
        "ssm_d": [9, 1],
        "ssm_norm.weight": [9, 8],
        "ssm_out.weight": [36, 72],
        "ffn_norm.weight": [36],
        "ffn_gate.weight": [52, 36],
        "ffn_up.weight": [52, 36],
        "ffn_down.weight": [36, 52],
    }
    for name in ("gate", "up", "down"):
        own = source[f"mlp.{name}.weight", 0].read()
        assert torch.equal(stored[f"blk.0.ffn_{name}.weight"], own)
    rate = model.checkpoint["mamba.A_log", 0].read()
    assert torch.equal(stored["blk.0.ssm_a"][:, 0], -rate.exp())
    assert found["granitehybrid.attention.head_count_kv"] == [0, 3, 0]
    assert found["granitehybrid.rope.scaling.finetuned"] is True
    assert found["granitehybrid.ssm.inner_size"] == 72


@pytest.mark.parametrize("target", ["qwen3_5", "granite_hybrid"])
def test_what_has_to_be_float32_stays_so(target: str, tmp_path: Path) -> None:
    keys = {"hidden": 64, "heads": 4, "kv": 2, "dim": 32, "ffn": 96}
    source = Checkpoint.open(save_for_gguf(tmp_path / "source", **keys))
    model = GGUFModel.of(find_target("gguf").convert(linearize(target, source)))
    write(model, tmp_path / "q.gguf", "q8_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    wide = {name for name, kind in kinds.items() if kind == "F32"}
    assert {f"blk.0.{name}" for name in ("ssm_a", "ssm_conv1d.weight", "ssm_norm.weight")} <= wide
    assert kinds["blk.0.ssm_out.weight"] == kinds["blk.1.attn_q.weight"] == "Q8_0"


def test_heads_that_share_a_key_are_spread(tmp_path: Path) -> None:
    model = GGUFModel.of(Checkpoint.open(save_hybrid(tmp_path / "model", "qwen3_5_text")))
    stored = {one.name: one.read() for one in model.tensors}
    # Two keys with three heads of values each.
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    own = {
        name: model.checkpoint[f"delta.{role}", 0].read()
        for name, role in {
            "ssm_alpha.weight": "decay.weight",
            "ssm_beta.weight": "beta.weight",
            "ssm_dt.bias": "decay.bias",
            "attn_gate.weight": "gate.weight",
            "ssm_out.weight": "o.weight",
        }.items()
    }
    for name, value in own.items():
        if name == "ssm_out.weight":
            assert torch.equal(stored[f"blk.0.{name}"], value[:, rows])
        else:
            assert torch.equal(stored[f"blk.0.{name}"], value[order if len(value) == 6 else rows])
    whole = model.checkpoint.tensors["delta.qkv.weight", 0].read()
    assert torch.equal(stored["blk.0.attn_qkv.weight"], torch.cat((whole[:32], whole[32:][rows])))


def test_queries_and_gates_stay_head_by_head(tmp_path: Path) -> None:
    model = GGUFModel.of(Checkpoint.open(save_hybrid(tmp_path / "model", "qwen3_5_text")))
    stored = {one.name: one for one in model.tensors}
    packed = [key for key in model.checkpoint.tensors if key[0] == "attn.q_gate.weight"]
    assert packed
    for role, layer in packed:
        own = model.checkpoint.tensors[role, layer].read()
        assert torch.equal(stored[f"blk.{layer}.attn_q.weight"].read(), own)
        assert stored[f"blk.{layer}.attn_q.weight"].shape == tuple(own.shape)


def test_short_convolutions_get_zeros_for_older_tokens(tmp_path: Path) -> None:
    saved = save_hybrid(tmp_path / "model", "granitemoehybrid", mamba_conv_bias=False)
    model = GGUFModel.of(Checkpoint.open(saved))
    assert equality.row_length(model.checkpoint) > equality.SHORTEST
    stored = {one.name: one.read() for one in model.tensors}
    taps = model.checkpoint["mamba.conv.weight", 0].read()[:, 0]
    assert torch.equal(stored["blk.0.ssm_conv1d.weight"][:, 1:], taps)
    assert not stored["blk.0.ssm_conv1d.weight"][:, 0].any()
    # llama.cpp adds a bias, here none.
    assert not stored["blk.0.ssm_conv1d.bias"].any()
    assert "blk.1.ssm_conv1d.bias" not in stored


FULL = {"layer_types": ["full_attention"] * 3}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_5_text", FULL, "all of one kind"),
    ("qwen3_5_text", {"layer_types": ["linear_attention"] * 3}, "all of one kind"),
    ("qwen3_5_text", {"linear_value_head_dim": 4}, "linear_value_head_dim is 4 and linear_key"),
    ("qwen3_5_text", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, which llama.cpp adds"),
    ("granitemoehybrid", FULL, "all of one kind"),
    ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba.in_proj.bias', llama.cpp's granite"),
    ("granitemoehybrid", {"mamba_expand": 3, "mamba_n_heads": 9}, "108 wide, .*hidden_size (72)"),
    ("granitemoehybrid", {"time_step_limit": (0.0, 0.5)}, "time_step_limit is 0 to 0.5"),
]


@pytest.mark.parametrize(("family", "keys", "reason"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(family: str, keys: dict[str, Any], reason: str) -> None:
    assert not find_target("gguf").find_misfits(hybrid(family).to_dict())
    found = "; ".join(find_target("gguf").find_misfits(hybrid(family, **keys).to_dict()))
    assert all(piece in found for piece in reason.split(".*")), found


def test_a_bias_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source", attention_bias=True))
    made = linearize("qwen3_5", source)
    with pytest.raises(RegraftError, match=r"layers.1.self_attn.o_proj.bias' .* is not zero"):
        GGUFModel.of(find_target("gguf").convert(made))
    hybrids = linearize("granite_hybrid", source)
    with pytest.raises(RegraftError, match=r"mamba.in_proj.bias', llama.cpp's granitehybrid"):
        find_target("gguf").check_holds(hybrids)


def test_a_note_says_where_lengths_differ() -> None:
    assert not fit.find_notes(hybrid("qwen3_5_text").to_dict())
    (note,) = fit.find_notes(hybrid("qwen3_5_text", rms_norm_eps=1e-5).to_dict())
    assert "rms_norm_eps (1e-05)" in note


def test_the_command_writes_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source"))
    for target in ("qwen3_5", "granite_hybrid"):
        linearize(target, source).save(tmp_path / target)
    found = as_json(capsys, "export", str(tmp_path / "qwen3_5"), str(tmp_path / "out"))
    assert found["to"] == "qwen3_5" and found["gguf"][0]["file"] == "model-q8_0.gguf"
    line = ["export", str(tmp_path / "granite_hybrid"), str(tmp_path / "file"), "--to", "gguf"]
    assert as_json(capsys, *line)["gguf"][0]["file"] == "model-f32.gguf"
