"""What grew shrinks to its source byte for byte, or says which step and tensor are in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_main
from helpers.tiny import read_files, save_model, tiny
from helpers.zoo import TWO_TOWERS, build_towers

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.core.undo import FILE
from regraft.errors import RegraftError
from regraft.growth.shrink import find_places, shrink
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.grow_tower import GrowTower
from regraft.io.files import read_json, sha256, write_json
from regraft.io.output import MARKER

GROWTHS: list[tuple[str, dict[str, Any], Growth]] = [
    ("llama", {}, Growth(hidden=54, ffn=60, heads=18, layers=5, vocab=100)),
    ("llama", {}, Growth(ffn=104, layers=6, depth_init="stack")),
    ("llama", {"tie_word_embeddings": True}, Growth(untie=True, hidden=45, dtype="float64")),
    ("llama", {}, Growth(bridge=True, hidden=61, width_init="zero_in")),
    ("llama", {}, Growth(hidden=54, layers=5, width_init="copy")),
    ("qwen3", {}, Growth(ffn=60, layers=4, depth_init="llama_pro")),
    ("phi3", {}, Growth(ffn=60, heads=18, layers=4)),
    ("gpt2", {}, Growth(hidden=96, ffn=70, vocab=128)),
    ("olmo2", {}, Growth(ffn=60, layers=4)),
    ("mixtral", {}, Growth(ffn=64, layers=4)),
    ("bert", {}, Growth(ffn=60, vocab=100)),
]
LOST: list[tuple[str, Growth, str]] = [
    ("llama", Growth(hidden=72, width_init="tile"), r"Widen\(hidden=72.* rounding cannot"),
    ("llama", Growth(layers=4, dtype="bfloat16"), r"rounded by Deepen\(.*Store\("),
    ("llama", Growth(head_dim=12, layers=4), r"k_proj.*Widen\(.*head_dim=12"),
    ("gemma", Growth(hidden=54), r"embed_tokens.*Widen\(hidden=54"),
    ("qwen3", Growth(hidden=72), r"embed_tokens.*Widen\(hidden=72"),
]


@pytest.mark.parametrize(("family", "keys", "growth"), GROWTHS, ids=str)
def test_the_source_comes_back_byte_for_byte(
    family: str, keys: dict[str, Any], growth: Growth, tmp_path: Path
) -> None:
    tiny(family, **keys)[1].save_pretrained(tmp_path / "source")
    growth(Checkpoint.open(tmp_path / "source")).save(tmp_path / "grown")
    (tmp_path / "source").rename(tmp_path / "elsewhere")  # the grown model alone is enough
    shrink(tmp_path / "grown", tmp_path / "out")
    files = read_files(tmp_path / "out")
    files.pop(MARKER)
    assert files == read_files(tmp_path / "elsewhere")


@pytest.mark.parametrize("family", TWO_TOWERS)
def test_a_tower_comes_back(family: str, tmp_path: Path) -> None:
    build_towers(family)[1].save_pretrained(tmp_path / "source")
    first = GrowTower(tower="text", hidden=64, ffn=40, heads=8, layers=5)
    second = GrowTower(tower="vision", ffn=40, layers=4)
    second(first(Checkpoint.open(tmp_path / "source"))).save(tmp_path / "grown")
    shrink(tmp_path / "grown", tmp_path / "out")
    files = read_files(tmp_path / "out")
    files.pop(MARKER)
    assert files == read_files(tmp_path / "source")

    GrowTower(tower="text", hidden=64, how="duplicate")(Checkpoint.open(tmp_path / "source")).save(
        tmp_path / "copies"
    )
    with pytest.raises(RegraftError, match=r"text_model.*GrowTower\(.*rounding cannot"):
        shrink(tmp_path / "copies", tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_shards_tokens_card_and_two_growths_come_back(tmp_path: Path, capsys: Any) -> None:
    source = save_model(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    model = tiny("llama", layers=4, vocab=259, dtype="bfloat16")[1].to(torch.bfloat16)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="50KB")
    assert (source / "model.safetensors.index.json").exists()
    grown = Growth(layers=5, tokens=({"content": "hello"},))(Checkpoint.open(source))
    grown.save(tmp_path / "first")
    Growth(hidden=54)(Checkpoint.open(tmp_path / "first")).save(tmp_path / "second")
    code, out, err = run_main(capsys, "shrink", tmp_path / "second", tmp_path / "out", "--json")
    assert code == 0, err
    files = read_files(tmp_path / "out")
    files.pop(MARKER)
    assert files == read_files(source)
    shards = {file.name: sha256(file) for file in source.glob("*.safetensors")}
    assert json.loads(out)["files"] == shards and len(shards) > 1


@pytest.mark.parametrize(("family", "growth", "says"), LOST, ids=str)
def test_what_was_rounded_is_named(family: str, growth: Growth, says: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    growth(Checkpoint.open(tmp_path / "source")).save(tmp_path / "grown")
    with pytest.raises(RegraftError, match=says):
        shrink(tmp_path / "grown", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_changes_are_no_growth(tmp_path: Path) -> None:
    """Training, linearization, no growth at all, rows that tokens took, a damaged weight."""
    source = Checkpoint.open(save_model(tmp_path / "source"))
    grown = Growth(layers=5)(source)
    values = {grown.names[key]: lazy.read() for key, lazy in grown.tensors.items()}
    grown.with_values(values, {"step": "Train", "arguments": {}}).save(tmp_path / "trained")
    regraft.Remix(mixer="window", window=8)(source).save(tmp_path / "linear")
    tiny("llama", vocab=264)[1].save_pretrained(source.path)
    regraft.GrowVocab(tokens=["hello"])(Checkpoint.open(source.path)).save(tmp_path / "taken")
    for name, says in {
        "trained": "the step Train: training moved the weights",
        "linear": "the step Remix: it is no growth",
        "source": f"has no {FILE}: only what regraft grew",
        "taken": "added tokens took 1 of its rows, from 259 on",
    }.items():
        with pytest.raises(RegraftError, match=says):
            shrink(tmp_path / name, tmp_path / "out")


def test_a_damaged_undo_file_writes_nothing(tmp_path: Path) -> None:
    source = Checkpoint.open(save_model(tmp_path / "source"))
    Growth(hidden=54)(source).save(tmp_path / "grown")
    file = tmp_path / "grown" / FILE
    good = read_json(file)
    lineage = read_json(tmp_path / "grown" / "lineage.json")
    del lineage["files"][FILE]  # hashes that fit
    write_json(tmp_path / "grown" / "lineage.json", lineage)
    name = next(iter(good["tensors"]))
    for undo, says in [
        (good | {"names": ["../../x"]}, "outside of its folder"),
        (good | {"tensors": good["tensors"] | {name: "%"}}, "is damaged"),
        (good | {"headers": {"model.safetensors": "{}"}}, "does not come back"),
        (good | {"headers": {"model.safetensors": '{"a": 1}'}}, "a header"),
    ]:
        write_json(file, undo)
        with pytest.raises(RegraftError, match=says):
            shrink(tmp_path / "grown", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_places_are_those_of_all_numbers_or_none() -> None:
    source = torch.arange(6, dtype=torch.float64) * 2 + 1
    grown = torch.cat([torch.rand(3, dtype=torch.float64), source.flip(0), source * 2])
    assert find_places(grown, 6).tolist() == [8, 7, 6, 5, 4, 3]
    assert find_places(source / 2, 6) is None and find_places(source[1:], 6) is None
