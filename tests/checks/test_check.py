"""Receipts: they hold for honest outputs of every family and catch each kind of damage."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import FAMILIES, tiny
from rich.console import Console

from regraft.checks.check import check, print_receipts
from regraft.core.checkpoint import Checkpoint, LazyTensor, Provenance
from regraft.errors import RegraftError
from regraft.io import files
from regraft.mixers.remix import Remix


@pytest.fixture
def source(tmp_path: Path) -> Path:
    _, model = tiny("llama", attention_bias=True)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    "remix",
    [Remix(keep="1", window=9), Remix(mixer="supra", keep="none", window=0)],
    ids=["gated", "supra"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_honest_outputs_hold(family: str, remix: Remix, tmp_path: Path) -> None:
    _, model = tiny(family)
    model.save_pretrained(tmp_path / "source")
    remix(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    receipts = check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"], receipts
    assert receipts["zero_layers"] == 0.0 and receipts["parallel_vs_recurrent"] < 1e-5
    assert receipts["window_end"] == (None if remix.mixer == "supra" else 0.0)


def test_keeping_every_layer_is_exact(source: Path, tmp_path: Path) -> None:
    Remix(keep="all")(Checkpoint.open(source)).save(tmp_path / "out")
    receipts = check(source, tmp_path / "out")
    assert receipts["holds"] and receipts["rel_logit_diff"] == 0.0


@pytest.mark.parametrize(
    "key",
    [
        ("attn.q.weight", 0),
        ("mixer.linear.k_proj.weight", 1),
        ("mixer.window.k_proj.weight", 1),
        ("norm.final.weight", None),
    ],
    ids=str,
)
def test_a_changed_number_is_named(source: Path, tmp_path: Path, key: tuple) -> None:
    made = Remix(keep="0")(Checkpoint.open(source))
    value = made.tensors[key].read().clone()
    value.view(-1)[3] += 0.5
    made.tensors[key] = LazyTensor(
        tuple(value.shape), value.dtype, Provenance("copied"), lambda: value
    )
    made.save(tmp_path / "out")
    receipts = check(source, tmp_path / "out")
    assert not receipts["holds"] and receipts["unequal"] == [made.names[key]]


def test_another_source_is_noticed(source: Path, tmp_path: Path) -> None:
    Remix()(Checkpoint.open(source)).save(tmp_path / "out")
    tiny("llama", attention_bias=True, seed=5)[1].save_pretrained(tmp_path / "other")
    receipts = check(tmp_path / "other", tmp_path / "out")
    assert not receipts["holds"] and not receipts["source_matches"] and receipts["unequal"]
    tiny("llama", layers=2)[1].save_pretrained(tmp_path / "shorter")
    with pytest.raises(RegraftError, match="was not made from"):
        check(tmp_path / "shorter", tmp_path / "out")


def test_trained_outputs_keep_what_they_can(source: Path, tmp_path: Path) -> None:
    made = Remix(keep="0")(Checkpoint.open(source))
    values = {made.names[key]: lazy.read() * 1.1 for key, lazy in made.tensors.items()}
    made.with_values(values, {"step": "Train", "arguments": {}}).save(tmp_path / "out")
    receipts = check(source, tmp_path / "out")
    assert receipts["holds"] and receipts["trained"]
    assert receipts["rel_logit_diff"] is None and receipts["window_end"] is None


def test_a_flipped_bit_in_an_output_is_an_error(source: Path, tmp_path: Path) -> None:
    Remix()(Checkpoint.open(source)).save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(RegraftError, match="is damaged"):
        check(source, tmp_path / "out")


def test_an_output_without_lineage_does_not_hold(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    receipts = check(source, tmp_path / "copy")
    assert (
        receipts["source_matches"] is False
        and not receipts["holds"]
        and receipts["rel_logit_diff"] == 0.0
    )


def test_table_says_what_does_not_hold(source: Path, tmp_path: Path) -> None:
    Remix()(Checkpoint.open(source)).save(tmp_path / "out")
    text = io.StringIO()
    receipts = check(source, tmp_path / "out")
    print_receipts(receipts, Console(file=text, width=120))
    print_receipts(
        receipts | {"holds": False, "unaccounted": list("abcde"), "source_matches": False},
        Console(file=text, width=120),
    )
    assert "a, b, c, d and 1 more" in text.getvalue() and "does NOT hold" in text.getvalue()
    assert torch.isfinite(torch.tensor(receipts["rel_logit_diff"])) and files.sha256(
        source / "model.safetensors"
    )
