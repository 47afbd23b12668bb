"""A PEFT adapter merged into its base: the numbers of the formula, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused, run_main
from helpers.tiny import save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import load
from regraft.core.checkpoint import Checkpoint
from regraft.io.identity import identify_model

PREFIX = "base_model.model."
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", layers=2)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def write_adapter(
    folder: Path, base: Path, extra: dict[str, Tensor] | None = None, **settings: Any
) -> dict[str, Tensor]:
    """An adapter on two maps; its tensors by name without PEFT's prefix."""
    values = load_file(base / "model.safetensors")
    pieces: dict[str, Tensor] = {}
    for module, rank in ((Q, 2), (DOWN, 3)):
        outputs, inputs = values[f"{module}.weight"].shape
        pieces[f"{module}.lora_A.weight"] = random(rank, inputs)
        pieces[f"{module}.lora_B.weight"] = random(outputs, rank)
    pieces |= extra or {}
    folder.mkdir()
    save_file(
        {PREFIX + name: value for name, value in pieces.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "rank_pattern": {"down_proj": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return pieces


def values_of(model: Checkpoint) -> dict[str, Tensor]:
    return {model.names[key]: lazy.read() for key, lazy in model.tensors.items()}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (5 / 2, 5 / 3)),
        ({"use_rslora": True}, (5 / 2**0.5, 5 / 3**0.5)),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 12}}, (5 / 2, 12 / 3)),
        ({"alpha_pattern": {".*q_proj": 1, "proj": 7}}, (1 / 2, 5 / 3)),
    ],
)
def test_maps_get_what_the_formula_says(settings, scales, base, tmp_path):
    pieces = write_adapter(tmp_path / "adapter", base, **settings)
    plain = values_of(Checkpoint.open(base))
    merged = Checkpoint.open(base, adapter=tmp_path / "adapter")
    for module, scale in zip((Q, DOWN), scales, strict=True):
        first, second = (pieces[f"{module}.lora_{one}.weight"] for one in "AB")
        plain[f"{module}.weight"] = plain[f"{module}.weight"] + scale * (second @ first)
    for name, value in values_of(merged).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)
    assert merged.history[-1]["step"] == "MergeAdapter"
    assert identify_model(merged.origin) != identify_model(base)


def test_dora_embeddings_biases_and_whole_tensors(base, tmp_path):
    plain = values_of(Checkpoint.open(base))
    vocab, hidden = plain["model.embed_tokens.weight"].shape
    extra = {
        f"{Q}.lora_magnitude_vector": random(plain[f"{Q}.weight"].shape[0]).abs() + 0.5,
        "model.embed_tokens.lora_embedding_A": random(2, vocab),
        "model.embed_tokens.lora_embedding_B": random(hidden, 2),
        "lm_head.weight": random(vocab, hidden),
        "model.norm.weight": random(hidden),
    }
    pieces = write_adapter(tmp_path / "adapter", base, extra, use_dora=True)
    merged = values_of(Checkpoint.open(base, adapter=tmp_path / "adapter"))
    first, second = (pieces[f"{Q}.lora_{one}.weight"] for one in "AB")
    wide = plain[f"{Q}.weight"] + 2.5 * second @ first
    length = wide.pow(2).sum(1, keepdim=True).sqrt()
    expected = extra[f"{Q}.lora_magnitude_vector"][:, None] * wide / length
    torch.testing.assert_close(merged[f"{Q}.weight"], expected)
    table = "model.embed_tokens"
    change = extra[f"{table}.lora_embedding_B"] @ extra[f"{table}.lora_embedding_A"]
    expected = plain[f"{table}.weight"] + 2.5 * change.T
    torch.testing.assert_close(merged[f"{table}.weight"], expected)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(merged[name], extra[name])


def test_a_map_stored_by_inputs(tmp_path):
    """GPT-2's maps are (inputs, outputs)."""
    base = save_model(tmp_path / "gpt2", "gpt2", layers=1)
    name = "transformer.h.0.attn.c_attn"
    before = values_of(Checkpoint.open(base))[f"{name}.weight"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    first, second = random(2, before.shape[0]), random(before.shape[1], 2)
    pieces = {f"{PREFIX}{name}.lora_A.weight": first, f"{PREFIX}{name}.lora_B.weight": second}
    save_file(pieces, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    after = values_of(Checkpoint.open(base, adapter=folder))[f"{name}.weight"]
    torch.testing.assert_close(after, before + (second @ first).T)


def test_an_adapted_model_grows_and_is_proven(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    write_adapter(tmp_path / "adapter", base)
    given = ("--adapter", tmp_path / "adapter")
    as_json(capsys, "grow", base, tmp_path / "grown", "--ffn", 96, *given)
    code, _, _ = run_main(capsys, "check", base, tmp_path / "grown", *given)
    assert code == 0
    lineage = json.loads((tmp_path / "grown" / "lineage.json").read_text())
    assert lineage["source"]["path"] == str(base)
    assert [step["step"] for step in lineage["steps"]] == ["MergeAdapter", "Widen"]

    as_json(capsys, "convert", base, tmp_path / "merged", *given, "--dtype", "bfloat16")
    merged = Checkpoint.open(base, adapter=tmp_path / "adapter")
    for name, value in values_of(merged).items():
        assert torch.equal(values_of(Checkpoint.open(tmp_path / "merged"))[name], value.bfloat16())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        both = [load(path)(tokens).logits for path in (merged.origin, base)]
    assert (both[0] - both[1]).abs().max() > 1e-3


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "kind": ({"peft_type": "IA3"}, {}, "is of kind 'IA3', which is not merged"),
    "setting": ({"use_qalora": True}, {}, "has use_qalora True, which is not merged"),
    "piece": ({}, {f"{Q}.lora_B.bias": torch.ones(2)}, "lora_B.bias', which is not merged"),
    "another": ({}, {"model.other.weight": torch.ones(2)}, "changes 'model.other.weight', which"),
    "shape": ({}, {"lm_head.weight": torch.ones(2)}, r"of shape \[2\], the model has"),
    "half": ({}, {"lm_head.lora_A.weight": torch.ones(2, 3)}, "and no '.lora_B.weight' beside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_is_one_line(case, base, tmp_path, capsys):
    settings, extra, words = REFUSED[case]
    write_adapter(tmp_path / "adapter", base, extra, **settings)
    line = refused(capsys, "plan", base, "--ffn", 96, "--adapter", tmp_path / "adapter")
    assert words.replace("\\", "") in line


def test_folders_that_are_no_adapter_and_adapters_that_are_no_model(base, tmp_path, capsys):
    line = refused(capsys, "plan", base, "--ffn", 96, "--adapter", base)
    assert "is no adapter (it has no adapter_config.json)" in line
    write_adapter(tmp_path / "adapter", base)
    line = refused(capsys, "plan", tmp_path / "adapter", "--ffn", 96)
    assert "is an adapter" in line and "--adapter" in line
    line = refused(capsys, "grow", base, tmp_path / "adapter", "--adapter", tmp_path / "adapter")
    assert "adapter" in line
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    line = refused(capsys, "plan", base, "--ffn", 96, "--adapter", tmp_path / "adapter")
    assert "has no adapter_model.safetensors" in line
