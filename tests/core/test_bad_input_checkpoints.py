"""Bad sources and bad outputs: one line with the value and what to do, and nothing left behind that
looks finished.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny import read_files, tiny
from safetensors.torch import load_file, save_file

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.io import output, safetensors, shard_writer
from regraft.mixers.remix import Remix


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny("llama")[1].save_pretrained(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny("llama")[1].save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 10)


def garble(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20] ^= 0x80
    file.write_bytes(data)


def overlap(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    first, second = [name for name in table if name != "__metadata__"][:2]
    table[first]["data_offsets"] = table[second]["data_offsets"]
    head = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


def config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "truncated": (truncate, "model.safetensors' has .* bytes where its header says"),
    "empty file": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"cut short or not safetensors \(0 bytes\)",
    ),
    "garbage": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 500),
        "cut short or not safetensors",
    ),
    "bit of the header": (garble, "garbled safetensors header"),
    "overlapping spans": (overlap, "damaged"),
    "wrong shape": (
        lambda f: edited(f, lambda v: v.update({QUERY: torch.zeros(72, 35)})),
        r"q_proj.weight' in .* has shape \[72, 35\], expected \[72, 36\]",
    ),
    "missing tensor": (
        lambda f: edited(f, lambda v: v.__delitem__(NORM)),
        rf"lacks tensor '{NORM}' of shape \[36\]",
    ),
    "unclaimed": (
        lambda f: edited(
            f, lambda v: v.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(72)})
        ),
        (
            "the table of llama has no part for parameter"
            " 'model.layers.0.self_attn.q_proj.bias'.*config.json belongs"
        ),
    ),
    "integers": (
        lambda f: edited(f, lambda v: v.update({NORM: torch.ones(36, dtype=torch.int8)})),
        "is I8, not floating point: dequantise",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json' is not JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json' is \\[\\], not an object",
    ),
    "config not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"),
        "config.json' is not JSON",
    ),
    "unknown family": (lambda f: config(f, model_type="zebra"), "has no such model_type"),
    "another size": (lambda f: config(f, intermediate_size=99), r"expected \[.*99.*\]"),
    "quantised": (lambda f: config(f, quantization_config={"bits": 4}), "is quantised by 'None'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors or"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin' is a pickle, .*: `regraft convert",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_source(name: str, single: Path) -> None:
    damage, message = DAMAGE[name]
    damage(single)
    with pytest.raises(RegraftError, match=message) as caught:
        Checkpoint.open(single)
    assert "\n" not in str(caught.value)


def test_missing_path_and_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="no model at '.*nowhere'"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "model.txt").write_text("hello")
    with pytest.raises(RegraftError, match="is not a GGUF file"):
        Checkpoint.open(tmp_path / "model.txt")


def test_damaged_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40)
    with pytest.raises(RegraftError, match="model.gguf"):
        Checkpoint.open(file)
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(RegraftError, match="holds 2 GGUF files"):
        Checkpoint.open(tmp_path / "two")


def test_missing_shard(source: Path) -> None:
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RegraftError, match=f"lacks shard '{shard.name}'"):
        Checkpoint.open(source)


def test_shard_that_lacks_a_listed_tensor(source: Path) -> None:
    shard = sorted(source.glob("model-*.safetensors"))[0]
    values = load_file(shard)
    lost = sorted(values)[0]
    del values[lost]
    save_file(values or {"extra": torch.zeros(1)}, shard)
    with pytest.raises(RegraftError, match=f"lacks tensor '{lost}'"):
        Checkpoint.open(source)


def test_index_without_map(source: Path) -> None:
    (source / safetensors.INDEX).write_text("{}")
    with pytest.raises(RegraftError, match="lacks the key 'weight_map'"):
        Checkpoint.open(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(single: Path, value: float, tmp_path: Path) -> None:
    edited(single, lambda values: values[NORM].fill_(value))
    with pytest.raises(RegraftError, match=f"tensor '{NORM}' .* holds NaN or infinity"):
        Remix()(Checkpoint.open(single)).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["single"]


def test_output_that_exists(single: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single)
    checkpoint.save(tmp_path / "out")
    with pytest.raises(
        RegraftError, match="out' exists: choose another output or pass --overwrite"
    ):
        checkpoint.save(tmp_path / "out")
    checkpoint.save(tmp_path / "out", overwrite=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(RegraftError, match="is not overwritten: 'thesis.txt'"):
        checkpoint.save(tmp_path / "papers", overwrite=True)


def test_overwriting_the_source_itself(single: Path) -> None:
    before = read_files(single)
    linearized = Remix(keep="all")(Checkpoint.open(single))
    for out in (single, single / ".." / single.name, single / "inside", single.parent):
        with pytest.raises(RegraftError, match="is the source|lies in the source|holds the source"):
            linearized.save(out, overwrite=True)
    assert read_files(single) == before


def test_full_disk_leaves_nothing(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "_submit_write", full)
    with pytest.raises(
        RegraftError, match="cannot write '.*out'.*No space left on device.*free some space"
    ):
        Checkpoint.open(single).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["single"]


def test_leftovers_of_a_killed_run_are_not_in_the_way(single: Path, tmp_path: Path) -> None:
    hidden = shard_writer.partial_path(tmp_path / "out")
    hidden.mkdir(parents=True)
    output.Marker("unfinished output").write(hidden.parents[1])
    output.Marker("model").write(hidden)
    (hidden / "config.json").write_text("{}")
    Checkpoint.open(single).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "single"]


def test_recorded_hashes_catch_a_flipped_bit(single: Path, tmp_path: Path) -> None:
    Checkpoint.open(single).save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RegraftError, match=r"model.safetensors' is damaged or was edited: sha256"):
        Checkpoint.open(tmp_path / "out").verify()
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(RegraftError, match="no model.safetensors"):
        Checkpoint.open(tmp_path / "out")
