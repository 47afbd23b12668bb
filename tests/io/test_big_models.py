"""Big models: files written tensor by tensor, saves that go on after a kill, bounded memory, disks
that fill up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.tiny import read_files, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regraft.core import lineage, undo
from regraft.core.checkpoint import Checkpoint, LazyTensor, Provenance
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.io import output, safetensors, shard_writer
from regraft.io.direct_io import BUFFER_BYTES, DirectWriter
from regraft.plan.plan import OVERHEAD, Plan, writing_bytes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def grown(
    source: Path, at: int | None = None, error: BaseException | None = None, seed: int = 0
) -> Checkpoint:
    """A growth; reading its tensor number `at` raises."""
    target = Deepen(5, seed=seed)(Widen(hidden=72, ffn=104, how="tile")(Checkpoint.open(source)))
    return counted(target, [], at, error)


def counted(
    target: Checkpoint, reads: list[str], at: int | None = None, error: BaseException | None = None
):
    """The same checkpoint, noting which tensors are read; reading number `at` raises."""

    def noting(name: str, read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def value() -> torch.Tensor:
            reads.append(name)
            if error is not None and len(reads) == at:
                raise error
            return read()

        return value

    tensors = {
        key: replace(lazy, read=noting(target.names[key], lazy.read))
        for key, lazy in target.tensors.items()
    }
    return replace(target, tensors=tensors)


def interrupted(source: Path, out: Path, at: int = 30) -> Path:
    """A save stopped with Ctrl-C; its hidden directory, which holds finished shards."""
    with pytest.raises(KeyboardInterrupt):
        grown(source, at, KeyboardInterrupt()).save(out, shard_bytes=60_000)
    partial = shard_writer.partial_path(out)
    assert not out.exists() and list(partial.glob("*.safetensors"))
    return partial


def resumed(target: Checkpoint, out: Path, shard_bytes: int = 60_000) -> list[str]:
    """Save; the tensors that were computed."""
    reads: list[str] = []
    counted(target, reads).save(out, shard_bytes=shard_bytes)
    return reads


def test_files_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    values = {
        "b": torch.randn(3, 5).bfloat16(),
        "a.é": torch.randn(7).half(),
        "z": torch.randn(2, 3, 2).double(),
        "c": torch.randn(4, 4).T,
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(3.0),
        "a": torch.randn(5).bfloat16(),
    }
    lazies = {
        name: LazyTensor(tuple(v.shape), v.dtype, Provenance("fresh"), lambda v=v: v)
        for name, v in values.items()
    }
    partial = shard_writer.PartialDirectory(tmp_path)
    shard_writer.write_weights(partial, lazies, 10_000)
    save_file(
        {n: v.contiguous() for n, v in values.items()},
        tmp_path / "theirs",
        metadata={"format": "pt"},
    )
    ours = (tmp_path / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert partial.done == {"model.safetensors": hashlib.sha256(ours).hexdigest()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(values)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())


@pytest.mark.parametrize("changed", [{"shape": (5, 3)}, {"dtype": torch.float16}])
def test_a_tensor_that_breaks_its_promise_is_refused(
    changed: dict, source: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(source)
    key = ("norm.final.weight", None)
    broken = replace(
        checkpoint, tensors=checkpoint.tensors | {key: replace(checkpoint.tensors[key], **changed)}
    )
    with pytest.raises(
        RegraftError, match=r"'model.norm.weight' came out as torch.float32 \[36\], promised"
    ):
        broken.save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_every_hash_is_recorded(source: Path, tmp_path: Path) -> None:
    grown(source).save(tmp_path / "out", shard_bytes=60_000)
    files = {file.name: file for file in (tmp_path / "out").iterdir()}
    recorded = lineage.read_lineage(tmp_path / "out")["files"]
    assert {n for n in files if n.endswith(".safetensors")} | {
        safetensors.INDEX,
        undo.FILE,
        "config.json",
    } == set(recorded)
    assert all(
        hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
        for name, digest in recorded.items()
    )
    assert not [name for name in files if name.endswith(".part")]


def test_ctrl_c_keeps_finished_shards_for_the_same_command(source: Path, tmp_path: Path) -> None:
    grown(source).save(tmp_path / "whole", shard_bytes=60_000)
    partial = interrupted(source, tmp_path / "out")
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    finished = {name for file in partial.glob("*.safetensors") for name in load_file(file)}
    reads = resumed(grown(source), tmp_path / "out")
    assert finished and not finished & set(reads) and len(reads) == len(set(reads))
    assert finished | set(reads) == set(grown(source).names.values())
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")
    assert not partial.exists()


def damaged_marker(partial: Path, source: Path) -> None:
    (partial / output.MARKER).write_text('{"fingerprint":')


def lost_marker(partial: Path, source: Path) -> None:
    (partial / output.MARKER).unlink()


def other_source(partial: Path, source: Path) -> None:
    values = load_file(source / "model.safetensors")
    save_file(
        values | {"model.norm.weight": values["model.norm.weight"] + 1},
        source / "model.safetensors",
    )


def other_config(partial: Path, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize(
    "change", [damaged_marker, lost_marker, other_source, other_config, "seed", "shards"]
)
def test_anything_else_starts_anew(change: Callable | str, source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path / "out")
    if callable(change):
        change(partial, source)
    seed, size = (1 if change == "seed" else 0), (61_000 if change == "shards" else 60_000)
    reads = resumed(grown(source, seed=seed), tmp_path / "out", size)
    assert sorted(reads) == sorted(grown(source).names.values())
    grown(source, seed=seed).save(tmp_path / "whole", shard_bytes=size)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_a_hidden_folder_of_somebody_else_is_not_touched(source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path / "out")
    hidden = partial.parents[1]
    (hidden / "mine.txt").write_text("years of work")
    grown(source).save(tmp_path / "out", shard_bytes=60_000)
    assert Checkpoint.open(tmp_path / "out").layers == 5
    assert (hidden / "mine.txt").read_text() == "years of work"


def test_values_in_memory_are_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    values = {checkpoint.names[key]: lazy.read() for key, lazy in checkpoint.tensors.items()}
    trained = checkpoint.with_values(values, {"step": "Train"})
    with pytest.raises(KeyboardInterrupt):
        counted(trained, [], 20, KeyboardInterrupt()).save(tmp_path / "out", shard_bytes=20_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_errors_leave_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        grown(source, 30, ZeroDivisionError()).save(tmp_path / "out", shard_bytes=20_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_two_runs_do_not_write_one_output(source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path / "out")
    descriptor = os.open(partial.parents[1], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RegraftError, match="another run is writing '.*out.regraft'"):
            grown(source).save(tmp_path / "out", shard_bytes=60_000)
        assert list(partial.glob("*.safetensors"))
    finally:
        os.close(descriptor)
    grown(source).save(tmp_path / "out", shard_bytes=60_000)


@pytest.mark.parametrize("swaps", [True, False])
def test_what_is_replaced_stays_until_all_is_written(
    swaps: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(output, "exchange_paths", lambda left, right: False)
    Checkpoint.open(source).save(tmp_path / "out")
    before = read_files(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        grown(source, 30, KeyboardInterrupt()).save(
            tmp_path / "out", overwrite=True, shard_bytes=60_000
        )
    assert read_files(tmp_path / "out") == before
    grown(source).save(tmp_path / "out", overwrite=True, shard_bytes=60_000)
    assert Checkpoint.open(tmp_path / "out").layers == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_link_to_a_directory_stays_one(source: Path, tmp_path: Path) -> None:
    Checkpoint.open(source).save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    grown(source).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and Checkpoint.open(tmp_path / "real").layers == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "source"]


def test_a_disk_too_small_is_seen_before_anything_is_computed(
    source: Path, small_disk: Path
) -> None:
    reads: list[str] = []
    with pytest.raises(
        RegraftError,
        match=r"No space left on device: [\d,]+ bytes to write, [\d,]+ free.*free some",
    ):
        counted(grown(source), reads).save(small_disk / "out", shard_bytes=60_000)
    assert not reads and not list(small_disk.iterdir())


def test_a_disk_that_fills_up_gets_its_space_back(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "check_space", lambda folder, needed: None)
    with pytest.raises(
        RegraftError, match="cannot write '.*out'.*No space left on device.*free some space"
    ):
        grown(source).save(small_disk / "out", shard_bytes=60_000)
    assert not list(small_disk.iterdir())


def test_a_failing_flush_gives_the_space_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        if path.name.startswith("model-00003"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shard_writer, "sync", fails)
    with pytest.raises(RegraftError, match="Input/output error"):
        grown(source).save(tmp_path / "out", shard_bytes=60_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


MEMORY = """
import json, re, sys, threading, time
import torch
from regraft.core.checkpoint import Checkpoint
from regraft.plan.plan import Plan
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen

def anonymous():
    return int(re.search(rb"RssAnon:\\s+(\\d+)", open("/proc/self/status", "rb").read())[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

torch.set_num_threads(1)
source = Checkpoint.open(sys.argv[1])
target = eval(sys.argv[2])(source)
begin = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
target.save(sys.argv[3], shard_bytes=500_000_000)
print(json.dumps([peak - begin, Plan.of(source, target).peak_bytes]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer and 120 MB, most of it in two embeddings."""
    folder = tmp_path_factory.mktemp("large")
    tiny("llama", hidden=32, heads=4, kv=2, dim=64, ffn=64, layers=1)[1].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "vocab_size": 24_000,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = {name: list(v.shape) for name, v in load_file(folder / "model.safetensors").items()}
    sizes = {32: 1024, 64: 2048, 97: 24_000}
    values = {}
    for name, shape in names.items():
        full = [
            size if "self_attn" in name and size in (256, 128) else sizes.get(size, size)
            for size in shape
        ]
        values[name] = torch.rand(full).bfloat16()
    save_file(values, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(
    "steps", ["Deepen(3)", "Widen(hidden=1280)", "Widen(hidden=2048, how='tile')"]
)
def test_memory_stays_under_the_forecast(steps: str, large: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(large), steps, str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    peak, forecast = json.loads(run.stdout)
    assert peak <= forecast
    assert forecast <= 4 * peak + OVERHEAD, "the forecast says nothing"
    shutil.rmtree(tmp_path / "out")


def test_forecast_counts_what_is_made(source: Path) -> None:
    opened = Checkpoint.open(source)
    assert (
        writing_bytes(opened, opened)
        == OVERHEAD
        == writing_bytes(opened, Deepen(6, how="upscale")(opened))
    )
    wider = Widen(hidden=72, how="tile")(opened)
    assert Plan.of(opened, wider).peak_bytes == OVERHEAD + 5 * 4 * 97 * 72


def put(file: Path, pieces: list[bytes]) -> None:
    with DirectWriter(file) as stream:
        for piece in pieces:
            stream.write(piece)


@pytest.mark.parametrize(
    "size", [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 5, 2 * BUFFER_BYTES + 4097]
)
def test_files_past_the_page_cache_hold_every_byte(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    put(tmp_path / "out", [data[:1000], data[1000:1007], data[1007:]])
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("call", ["open", "write"])
def test_a_system_that_refuses_direct_writing_gets_ordinary_writing(
    call: str, tmp_path: Path, monkeypatch
) -> None:
    real, refused = getattr(os, call), []

    def refusing(target, argument, *rest):
        flags = argument if call == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refused.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, argument, *rest)

    data = random.Random(0).randbytes(BUFFER_BYTES + 3)
    monkeypatch.setattr(os, call, refusing)
    put(tmp_path / "out", [data])
    assert len(refused) == 1 and (tmp_path / "out").read_bytes() == data


def test_a_full_disk_is_not_taken_for_a_refusal() -> None:
    with pytest.raises(OSError, match="No space left"):
        put(Path("/dev/full"), [bytes(BUFFER_BYTES)])
