"""GGUF files for llama.cpp's rwkv6qwen2: what it computes of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.gguf import save_for_gguf
from helpers.rwkv6qwen2 import SQUARE, make_student, remix, run_file, stir
from helpers.tiny import tokens

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import find_target
from regraft.export.gguf.writer import read_tensors
from regraft.export.write import write_export
from regraft.growth.sizes_to_steps import cast_checkpoint
from regraft.mixers.remix import Remix

gguf = pytest.importorskip("gguf")
TARGET = find_target("rwkv6qwen2")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"grouped": False, "shift_rank": 5, "rank": 7}),
    ("qwen2", {"decay": "static", "balance": False, "gate": "none"}),
    ("phi3", {"shift": False}),
]


@torch.no_grad()
def difference(made: Checkpoint, file: Path) -> float:
    """What llama.cpp computes of a file, beside the model, as a share of the largest logit."""
    ids = tokens(1, 90, 260)
    tensors, facts = read_tensors(file), TARGET.prepare(made).metadata
    expected = modeling.materialize(made).double()(ids, use_cache=False).logits[0]
    found = run_file(tensors, facts, ids[0].tolist())
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_the_file_computes_what_the_model_computes(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = make_student(tmp_path / "source", family, **options)
    assert TARGET.find_misfits(made.config) == []
    TARGET.prepare(made).write(tmp_path / "model.gguf", "f32")
    assert difference(made, tmp_path / "model.gguf") < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_lose_nothing(dtype: str, square: Checkpoint, tmp_path: Path) -> None:
    """Queries that are divided by one minus decay are stored in float32."""
    made = stir(remix(decay="static", balance=False, gate="none")(cast_checkpoint(square, dtype)))
    model = TARGET.prepare(made)
    model.write(tmp_path / "model.gguf", model.dtype)
    assert model.dtype != "f32" and difference(made, tmp_path / "model.gguf") < 1e-5


def test_layers_of_several_ranks_share_one_size(tmp_path: Path) -> None:
    """Layers may differ in their options; smaller maps are filled up with zeros."""
    source = Checkpoint.open(save_for_gguf(tmp_path / "source", **SQUARE))
    first = remix(rank=3, shift=False).build_config(source)["mixers"]
    made = remix(rank=9, shift_rank=4)(source)
    config = {**made.config, "mixers": [first[0], *made.config["mixers"][1:]]}
    assert TARGET.find_misfits(config) == []
    metadata = TARGET.prepare(made).metadata
    assert (metadata["time_mix_extra_dim"], metadata["time_decay_extra_dim"]) == (4, 9)


REFUSED: list[tuple[Remix, str]] = [
    (
        Remix("rwkv6", "none", window=0),
        "a norm .layer., .* silu, .* bonus, .* decay: linearize with --for rwkv6qwen2$",
    ),
    (remix(rotary=True), "are rotated .*--for rwkv6qwen2"),
    (remix(norm="layer"), "have a norm .layer."),
    (remix(gate="silu"), "its gate is silu"),
    (remix(bonus=True), "it has a bonus"),
    (remix(balance=False), "only of a static decay"),
    (Remix("rwkv6", "none"), "mixer gated .rwkv6 beside a window.: linearize with --for"),
    (Remix("gla", "none", window=0), "layer 0 has the mixer gla: linearize with --for"),
    (Remix(**TARGET.remix | {"keep": "1"}), "layer 1 has softmax attention, .*--keep none"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=str)
def test_a_refusal_names_the_flag(change: Remix, reason: str, square: Checkpoint) -> None:
    with pytest.raises(RegraftError, match=reason):
        write_export(change(square), "rwkv6qwen2", "never")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp("square") / "source"
    return Checkpoint.open(save_for_gguf(place, **SQUARE))


SOURCES = [
    ({}, "72 wide together and hidden_size is 36"),
    (SQUARE | {"attention_bias": True}, "o_proj has a bias"),
    (SQUARE | {"mlp_bias": True}, "MLP has biases"),
    (SQUARE | {"hidden_act": "gelu"}, "hidden_act is gelu"),
]


@pytest.mark.parametrize(("keys", "reason"), SOURCES, ids=str)
def test_a_source_that_does_not_fit(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source", **keys))
    assert reason in TARGET.find_misfits(remix().build_config(source))[0]


def test_keys_that_would_vanish_are_refused(square: Checkpoint, tmp_path: Path) -> None:
    made = remix(decay="static", balance=False)(square)
    still = {
        name: lambda key=key: torch.full(made.tensors[key].shape, -30.0)
        for key, name in made.names.items()
        if key[0] == "mixer.decay"
    }
    with pytest.raises(RegraftError, match="a decay of layer 0 is 1 in float32"):
        write_export(made.with_readers(still, {"step": "Train"}), "rwkv6qwen2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_a_source_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--for` makes what fits; both files are read back; nothing says that transformers loads it."""
    source = str(save_for_gguf(tmp_path / "source", "qwen2", tie_word_embeddings=True))
    linear, out = str(tmp_path / "linear"), tmp_path / "out"
    assert as_json(capsys, "plan", source, "--for", "rwkv6qwen2")
    as_json(capsys, "linearize", source, linear, "--for", "rwkv6qwen2")
    found = as_json(capsys, "export", linear, str(out))  # the only target that holds it
    assert (found["to"], found["notes"]) == ("rwkv6qwen2", [])
    assert [one["file"] for one in found["gguf"]] == ["model-f32.gguf", "model-q8_0.gguf"]
    assert found["check"] is None and found["gguf"][0]["difference"] is None
    card = (out / "README.md").read_text()
    assert "`rwkv6qwen2`" in card and "AutoModel" not in card and "2404.05892" in card
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == [
        "README.md", "lineage.json", "model-f32.gguf", "model-q8_0.gguf",
    ]  # fmt: skip
    stored = read_tensors(out / "model-f32.gguf")
    assert torch.equal(stored["output.weight"], stored["token_embd.weight"])
    kinds = {
        one.name: one.tensor_type.name for one in gguf.GGUFReader(out / "model-q8_0.gguf").tensors
    }
    assert kinds["blk.0.time_mix_w2.weight"] == kinds["blk.0.time_mix_lerp_fused.weight"] == "F32"
    reason = refused(capsys, "export", source, str(tmp_path / "no"), "--to", "rwkv6qwen2")
    assert "layer 0 has softmax attention" in reason
