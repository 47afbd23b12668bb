"""Checkpoints: opened lazily, taken apart, saved whole, read back by stock transformers; GGUF;
lineage.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.gguf_model import write_gguf
from helpers.tiny import FAMILIES, GROWABLE, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from regraft import modeling
from regraft.core import lineage
from regraft.core.checkpoint import Checkpoint, with_older_keys
from regraft.errors import RegraftError
from regraft.io import files, gguf, safetensors


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    _, model = tiny(request.param)
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


def test_opening_reads_no_weights(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: safetensors.TensorEntry) -> torch.Tensor:
        raise AssertionError(f"read {entry.name}")

    monkeypatch.setattr(safetensors.TensorEntry, "read", refuse)
    model, path = saved
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.names.values()) == {name for name, _ in model.named_parameters()}
    assert all(lazy.provenance.kind == "copied" for lazy in checkpoint.tensors.values())


def test_save_is_read_back_by_stock_transformers(saved, tmp_path: Path) -> None:
    model, path = saved
    checkpoint = Checkpoint.open(path)
    checkpoint.save(tmp_path / "out", shard_bytes=30_000)
    assert (tmp_path / "out" / safetensors.INDEX).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    x = tokens(2, 11)
    assert torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(
        modeling.materialize(Checkpoint.open(tmp_path / "out"))(x).logits, model(x).logits
    )
    assert not list(tmp_path.glob(".out*"))


def test_fused_parts_come_apart_as_the_model_uses_them(saved) -> None:
    model, path = saved
    checkpoint = Checkpoint.open(path)
    family = checkpoint.anatomy.family
    x = torch.randn(5, checkpoint.sizes["hidden"])
    slot = modeling.slots(model, checkpoint)[1]
    if family == "gpt2":
        expected = slot.c_attn(x).split(72, -1)
    elif family == "gpt_neox":
        expected = [t.reshape(5, -1) for t in slot.query_key_value(x).view(5, 9, 24).chunk(3, -1)]
    else:
        expected = [slot.q_proj(x), slot.k_proj(x), slot.v_proj(x)]
    for name, value in zip("qkv", expected, strict=True):
        weight = checkpoint[f"attn.{name}.weight", 1]
        biased = family in ("qwen2", "gpt_neox", "gpt2")
        bias = checkpoint[f"attn.{name}.bias", 1].read() if biased else None
        assert weight.shape == checkpoint.signature(f"attn.{name}.weight").shape(checkpoint.sizes)
        torch.testing.assert_close(torch.nn.functional.linear(x, weight.read(), bias), value)


def test_transposed_storage_is_turned(tmp_path: Path) -> None:
    _, model = tiny("gpt2")
    model.save_pretrained(tmp_path / "source")
    lazy = Checkpoint.open(tmp_path / "source")["mlp.up.weight", 0]
    assert lazy.shape == (52, 72) and torch.equal(
        lazy.read(), model.transformer.h[0].mlp.c_fc.weight.T
    )


def test_hub_names_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    _, model = tiny("gpt2")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    values = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    values["h.0.attn.bias"] = torch.ones(4, 4, dtype=torch.uint8)
    values["lm_head.weight"] = values["wte.weight"].clone()
    save_file(values, file)
    checkpoint = Checkpoint.open(tmp_path / "source")
    assert checkpoint.dropped["h.0.attn.bias"].startswith("buffer")
    assert checkpoint.dropped["lm_head.weight"].startswith("tied")
    assert torch.equal(
        modeling.materialize(checkpoint)(tokens(1, 9)).logits, model(tokens(1, 9)).logits
    )


def test_sidecars_and_lineage_travel(tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "secret.bin").write_text("stays")
    Checkpoint.open(tmp_path / "source").save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (
        tmp_path / "out" / "secret.bin"
    ).exists()
    known = lineage.read_lineage(tmp_path / "out")
    assert known["source"]["sha256"] == files.sha256(tmp_path / "source" / "model.safetensors")
    assert known["files"]["model.safetensors"] == files.sha256(
        tmp_path / "out" / "model.safetensors"
    )
    assert sum(row["share"] for row in known["totals"].values()) == pytest.approx(1)
    assert "sha256" in (tmp_path / "out" / "README.md").read_text()
    Checkpoint.open(tmp_path / "out").verify()


def test_replaced_values_and_step_are_saved(tmp_path: Path) -> None:
    _, model = tiny("qwen3")
    model.save_pretrained(tmp_path / "source")
    values = {name: value + 1 for name, value in model.state_dict().items()}
    step = {"step": "Train", "arguments": {"tokens": 5}}
    Checkpoint.open(tmp_path / "source").with_values(values, step).save(tmp_path / "out")
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"],
        values["model.norm.weight"],
    )
    again = Checkpoint.open(tmp_path / "out")
    assert again.history == (step,) and lineage.is_trained(lineage.read_lineage(again.path))
    with pytest.raises(RegraftError, match="new value of 'model.embed_tokens.weight' is nothing"):
        again.with_values({}, step)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    Checkpoint.open(tmp_path / "source").save(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "source"))
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.bfloat16
        for name in theirs
    )


def test_readers_without_rope_parameters_find_older_keys() -> None:
    config = tiny("gpt_neox")[0].to_dict()
    older = with_older_keys(config)
    assert (older["rope_theta"], older["rotary_pct"]) == (10000.0, 0.25)
    scaled = {
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0},
    }
    assert with_older_keys(scaled)["rope_scaling"]["factor"] == 2.0
    assert with_older_keys({"model_type": "gpt2"}) == {"model_type": "gpt2"}
    partial = {
        "model_type": "phi",
        "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.4},
    }
    assert with_older_keys(partial)["partial_rotary_factor"] == 0.4
    assert with_older_keys(partial | {"rope_theta": 6.0})["rope_theta"] == 6.0


def test_readers_without_nested_rope_parameters_find_older_keys() -> None:
    full, sliding = {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5}, {"rope_theta": 2e4}
    rope = {"full_attention": full, "sliding_attention": sliding}
    older = with_older_keys({"model_type": "gemma3_text", "rope_parameters": rope})
    assert (
        older["rope_theta"],
        older["rope_local_base_freq"],
        older["rope_scaling"]["factor"],
    ) == (7e5, 2e4, 8.0)
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "rope_theta": 5e4}
    rope = long | {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    older = with_older_keys({"model_type": "phi3", "rope_parameters": rope})
    assert older["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0],
        "long_factor": [2.0],
    }
    assert (older["rope_theta"], older["original_max_position_embeddings"]) == (5e4, 16)


@pytest.mark.parametrize("family", GROWABLE)
def test_parameters_are_filed_under_the_names_that_transformers_writes(
    family: str, tmp_path: Path
) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    Checkpoint.open(tmp_path / "source").save(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "source"))
    assert set(ours) == set(theirs)


def test_unknown_role_lists_the_known() -> None:
    with pytest.raises(RegraftError, match="has no part 'attn.z.weight'"):
        from regraft.families.llama import anatomy

        Checkpoint(Path("x"), {}, anatomy, {}, {}, {}, None).signature("attn.z.weight")


def test_missing_tensor_of_a_role_lists_the_known(tmp_path: Path) -> None:
    _, model = tiny("qwen3")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(
        RegraftError, match="qwen3 has no 'attn.q.bias' in layer 1: use one of attn.k.weight"
    ):
        Checkpoint.open(tmp_path / "source")["attn.q.bias", 1]


def test_shards_are_filled_in_order() -> None:
    assert safetensors.group_shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]


def test_gguf_is_planned_from_its_header_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    config, model = tiny("llama", hidden=72)
    file = tmp_path / "gguf" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, model, config)
    planned = Checkpoint.open(file.parent)
    assert planned.sizes["group"] == 3 and not (tmp_path / "cache").exists()
    assert torch.equal(
        planned.tensors["attn.k.weight", 1].read(), model.model.layers[1].self_attn.k_proj.weight
    )
    opened = Checkpoint.open(file)
    assert opened.folder is not None and opened.history == planned.history
    assert planned.config["architectures"] == opened.config["architectures"] == ["LlamaForCausalLM"]
    torch.testing.assert_close(
        modeling.materialize(opened)(tokens(1, 9)).logits, model(tokens(1, 9)).logits
    )
    opened.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["source"][
        "sha256"
    ] == files.sha256(file)
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "other"))
    with ThreadPoolExecutor(2) as pool:  # two at once: one converts, the other waits
        first, second = pool.map(gguf.convert_once, [file, file])
    assert first == second and len(list(first.parent.glob("*/config.json"))) == 1
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 5000)
    with pytest.raises(RegraftError, match="tiny.gguf"):
        Checkpoint.open(file)
