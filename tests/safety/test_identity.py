"""A run that is resumed and a cache go on with the input they began with, or not at all.

The law for each verb: a run is cut off, then each of its inputs in turn is replaced by one of the
same size, at the same path and with the same times. The command is refused and names the input.
With the old content, all of it at other paths, the command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from helpers.cli import as_json, refused, run_main
from helpers.tiny import byte_tokenizer, save_model, tiny, write_text
from safetensors.torch import load_file, save_file

from regraft.cli import main as cli
from regraft.compare import scheduler
from regraft.core.checkpoint import Checkpoint
from regraft.core.moments import MOMENTS
from regraft.data.corpus import TextMixture
from regraft.data.text import Text
from regraft.errors import RegraftError
from regraft.io import identity
from regraft.io.output import WORK
from regraft.io.request import find_change
from regraft.mixers.remix import Remix
from regraft.train import loop
from regraft.train.layerwise import align
from regraft.train.teacher_cache import CachedTeacher, TeacherCacheConfig

TRAINING = ("--tokens", 384, "--length", 32, "--batch", 2)  # six steps
Words = tuple[object, ...]


class Killed(BaseException):
    """A run cut off."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of input, by name."""
    place = tmp_path_factory.mktemp("originals")
    save_model(place / "model")
    save_model(place / "teacher", seed=1)
    Remix(keep="0", window=16, sinks=2)(Checkpoint.open(place / "teacher")).save(place / "linear")
    names = dict(Checkpoint.open(place / "model").names)
    values = load_file(place / "model" / "model.safetensors")
    moments = {f"{kind}/{name}": values[name].abs() for kind in MOMENTS for name in names.values()}
    moments |= {f"step/{name}": torch.tensor(3.0) for name in names.values()}
    save_file(moments, place / "moments.safetensors")
    write_text(place / "text.txt", words=600)
    write_text(place / "heldout.txt", documents=3)
    return place


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """A copy of the inputs that may be changed."""
    return Path(shutil.copytree(originals, tmp_path / "inputs"))


def change_weights(file: Path) -> None:
    """Other numbers in one tensor: its first ones are those that follow."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 64] = data[start + 64 : start + 128]
    file.write_bytes(data)


def change_text(file: Path) -> None:
    """Another animal in the same number of letters."""
    file.write_text(file.read_text().replace("fox", "cat"))


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Inside, an input has another content of the same size and, of its files, the same times."""
    file = path / "model.safetensors" if path.is_dir() else path
    before, facts = file.read_bytes(), file.stat()
    if file.suffix == ".safetensors":
        change_weights(file)
    else:
        change_text(file)
    assert file.stat().st_size == facts.st_size and file.read_bytes() != before
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    yield
    file.write_bytes(before)


def last_line(capsys: Any, *words: object) -> str:
    """The line of a refusal; `grow` has said before what it will cost."""
    code, out, err = run_main(capsys, *words)
    assert code == 2 and not out, (code, out)
    return err.strip().splitlines()[-1]


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    """The `after`-th call of a function is the last thing that the run does."""
    function, calls = getattr(owner, name), []

    def dying(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) > after:
            raise Killed
        return function(*given, **named)

    monkeypatch.setattr(owner, name, dying)


def check_law(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    words: Callable[[Path], Words],
    stop: tuple[Any, str, int],
    inputs: dict[str, str],
    goes_on: Callable[[Words], None],
) -> None:
    """The law for one verb.

    Args:
        capsys: pytest's.
        monkeypatch: pytest's.
        place: the inputs.
        words: the command, from where its inputs are.
        stop: the function that the first run ends in, and how often it runs before.
        inputs: what stands in the refusal, by the input's name in `place`.
        goes_on: what happens with the old content.
    """
    with monkeypatch.context() as patch:
        cut_off(patch, *stop)
        with pytest.raises(Killed):
            cli.main([str(word) for word in words(place)])

    for name, said in inputs.items():
        with replaced(place / name):
            line = last_line(capsys, *words(place))
            assert said in line, (name, line)

    moved = place.with_name("moved")
    shutil.copytree(place, moved)
    shutil.rmtree(place)
    goes_on(words(moved))


def finish(
    capsys: Any, originals: Path, words: Callable[[Path], Words], out: Path, exact: bool = True
) -> Callable[[Words], None]:
    """Runs the command to its end, and compares the weights with those of a run without a stop."""

    def run(again: Words) -> None:
        as_json(capsys, *again)
        if not exact:
            return
        whole = [*words(originals)]
        whole[2] = out.with_name("undisturbed")
        as_json(capsys, *whole)
        one, two = (path / "model.safetensors" for path in (out, out.with_name("undisturbed")))
        assert one.read_bytes() == two.read_bytes()

    return run


def test_train(originals: Path, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"

    def words(of: Path) -> Words:
        data = ("--data", of / "text.txt", "--heldout", of / "heldout.txt")
        flags = ("--stage", "next", "--save-seconds", 0, "--moments", of / "moments.safetensors")
        return ("train", of / "model", out, *data, *flags, *TRAINING)

    inputs = {
        "model": "model: model.safetensors was",
        "moments.safetensors": "moments: file was",
        "text.txt": "file 1 was",
        "heldout.txt": "held-out data: file 1 was",
    }
    stop = (loop, "write_metrics_row", 4)
    check_law(
        capsys, monkeypatch, place, words, stop, inputs, finish(capsys, originals, words, out)
    )


@pytest.mark.parametrize("cached", [False, True])
def test_distil(
    cached: bool, originals: Path, place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    out = tmp_path / "out"

    def words(of: Path) -> Words:
        cache = ("--teacher-cache", of.parent / "cache") if cached else ()
        flags = ("--save-seconds", 0, "--teacher", of / "teacher", "--data", of / "text.txt")
        return ("train", of / "linear", out, *flags, *cache, *TRAINING)

    inputs = {
        "teacher": "teacher: model.safetensors was",
        "text.txt": "file 1 was",
        "linear": "linear/model.safetensors' is damaged",  # its lineage has the hash
    }
    stop = (loop, "write_metrics_row", 3)
    # Rows that were computed before the stop are read after it: steps are counted, and so rounded,
    # in another way.
    goes_on = finish(capsys, originals, words, out, exact=not cached)
    check_law(capsys, monkeypatch, place, words, stop, inputs, goes_on)


def test_another_model_is_refused(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Of the same shape, at another path: as MODEL, and as --teacher."""
    save_model(place / "other", seed=2)
    Remix(keep="0", window=16, sinks=2)(Checkpoint.open(place / "other")).save(place / "linear2")

    def words(model: str, teacher: str) -> Words:
        flags = ("--teacher", place / teacher, "--data", place / "text.txt", "--save-seconds", 0)
        return ("train", place / model, tmp_path / "out", *flags, *TRAINING)

    with monkeypatch.context() as patch:
        cut_off(patch, loop, "write_metrics_row", 3)
        with pytest.raises(Killed):
            cli.main([str(word) for word in words("linear", "teacher")])
    said = refused(capsys, *words("linear2", "teacher"))
    assert "with another input (model: model.safetensors was" in said
    assert "(teacher: model.safetensors was" in refused(capsys, *words("linear", "other"))


def test_layer_by_layer(originals: Path, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"

    def words(of: Path) -> Words:
        flags = ("--stream", "--stage", "align", "--data", of / "text.txt", *TRAINING)
        return ("train", of / "linear", out, "--teacher", of / "teacher", *flags)

    inputs = {
        "teacher": "teacher: model.safetensors was",
        "text.txt": "file 1 was",
        "linear": "is damaged",
    }
    stop = (align, "write_metrics_row", 8)
    check_law(
        capsys, monkeypatch, place, words, stop, inputs, finish(capsys, originals, words, out)
    )


def test_linearize(originals: Path, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"

    def words(of: Path) -> Words:
        flags = ("--method", "lolcats", "--keep", "0", "--window", 8)
        return ("linearize", of / "model", out, "--data", of / "text.txt", *flags, *TRAINING)

    inputs = {
        "model": "another input (source: model.safetensors was",
        "text.txt": "file 1 was",
    }
    stop = (loop, "write_metrics_row", 4)
    check_law(
        capsys, monkeypatch, place, words, stop, inputs, finish(capsys, originals, words, out)
    )


def test_fitting_of_ligo(originals: Path, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Cut off while the model is written: the fitted maps wait beside it."""
    out = tmp_path / "out"

    def words(of: Path) -> Words:
        fit = '{"steps": 2, "batch": 2, "length": 32}'
        flags = ("--hidden", 48, "--width-init", "ligo", "--fit", fit)
        return ("grow", of / "model", out, *flags, "--data", of / "text.txt")

    inputs = {"model": "source: model was", "text.txt": "data: rows was"}
    stop = (Checkpoint, "save", 0)
    check_law(
        capsys, monkeypatch, place, words, stop, inputs, finish(capsys, originals, words, out)
    )


def test_recipes(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def words(of: Path) -> Words:
        fields = {
            "source": str(of / "model"),
            "train": [{"path": str(of / "text.txt")}],
            "heldout": str(of / "heldout.txt"),
            "remix": {"keep": "0", "window": 8},
            "calibration": 0,
            "stages": [{"kind": "distil", "tokens": 256, "length": 32}],
            "measure": {"windows": 1, "length": 32, "bench": [], "recall": [], "prompts": []},
        }
        file = tmp_path / f"{of.name}.yaml"
        file.write_text(yaml.safe_dump(fields))
        return ("run", file, tmp_path / "out")

    def goes_on(again: Words) -> None:
        as_json(capsys, *again)
        shutil.rmtree(tmp_path / "moved" / "model")
        as_json(capsys, *again)  # a finished run needs its source no more

    inputs = {
        "model": "source: model.safetensors was",
        "heldout.txt": "heldout: file 1 was",
        "text.txt": "file 1 was",
    }
    stop = (loop, "write_metrics_row", 2)
    check_law(capsys, monkeypatch, place, words, stop, inputs, goes_on)


def test_comparisons(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Refused before any arm is started."""

    def words(of: Path) -> Words:
        budget = {"tokens": 128, "length": 16, "batch": 8}
        fields = {
            "task": "next",
            "source": str(of / "model"),
            "others": {"second": str(of / "teacher")},
            "target": {"hidden": 48},
            "pretrain": budget,
            "train": budget,
            "arms": [
                {"name": "scratch", "scratch": True},
                {"name": "pad", "grow": {}, "source": "second"},
            ],
            "data": str(of / "text.txt"),
            "heldout": str(of / "heldout.txt"),
            "seeds": [0],
        }
        file = tmp_path / f"{of.name}.yaml"
        file.write_text(yaml.safe_dump(fields))
        return ("compare", file, tmp_path / "out")

    def goes_on(again: Words) -> None:
        with monkeypatch.context() as patch:
            cut_off(patch, scheduler, "run_jobs", 0)
            with pytest.raises(Killed):
                cli.main([str(word) for word in again])

    inputs = {
        "model": "source 'source': model.safetensors was",
        "teacher": "source 'second': model.safetensors was",
        "text.txt": "data: file 1 was",
        "heldout.txt": "heldout: file 1 was",
    }
    stop = (scheduler, "run_jobs", 0)
    check_law(capsys, monkeypatch, place, words, stop, inputs, goes_on)


def test_shards_of_another_source_are_not_kept(place: Path, tmp_path: Path, monkeypatch) -> None:
    """A growth that was cut off keeps its finished shards, but for the same source only."""

    def save(stop: int | None, out: str) -> int:
        with monkeypatch.context() as patch:
            grown = Remix(keep="0", window=8)(Checkpoint.open(place / "model"))
            reads: list[Any] = []

            def counted(read: Callable[[], Any]) -> Callable[[], Any]:
                def value() -> Any:
                    reads.append(read)
                    if len(reads) == stop:
                        raise Killed
                    return read()

                return value

            tensors = {
                key: dataclasses.replace(lazy, read=counted(lazy.read))
                for key, lazy in grown.tensors.items()
            }
            patch.setenv("IGNORED", "")
            dataclasses.replace(grown, tensors=tensors).save(tmp_path / out, shard_bytes=20_000)
            return len(reads)

    with pytest.raises(Killed):
        save(20, "out")
    shutil.copytree(tmp_path / ".out.regraft", tmp_path / ".same.regraft")
    (tmp_path / ".same.regraft" / WORK / "out").rename(tmp_path / ".same.regraft" / WORK / "same")
    total = save(None, "whole")
    assert save(None, "same") < total
    with replaced(place / "model"):
        assert save(None, "out") == total


def test_token_caches_know_their_text(place: Path, tmp_path: Path) -> None:
    """By content: another text with the old name, size and time is read; a moved one is not."""
    cache, file = tmp_path / "cache", place / "text.txt"

    def rows() -> torch.Tensor:
        text = Text(str(file))
        return TextMixture([text], byte_tokenizer(), cache=cache)(32)[:].input_ids

    first = rows()
    with replaced(file):
        assert not torch.equal(rows(), first)
    assert torch.equal(rows(), first)
    count = len(list(cache.rglob("journal.json")))
    assert count == 2
    (tmp_path / "elsewhere").mkdir()
    file = Path(shutil.move(file, tmp_path / "elsewhere" / "text.txt"))
    assert torch.equal(rows(), first) and len(list(cache.rglob("journal.json"))) == count


def test_teacher_caches_know_their_teacher(place: Path, tmp_path: Path) -> None:
    """Rows of a teacher answer for that teacher alone, wherever it is."""
    config = TeacherCacheConfig(tmp_path / "cache", 1 << 30)
    text = Text(str(place / "text.txt"))
    rows = TextMixture([text], byte_tokenizer())(32)[:4]

    def computed(path: Path) -> int:
        teacher = CachedTeacher(str(path), config)
        teacher.fetch_rows(rows, False, config.kind, teacher.compute_outputs)
        return teacher.flush()["computed"]

    assert computed(place / "teacher") == 4 and computed(place / "teacher") == 0
    shutil.copytree(place / "teacher", tmp_path / "copy")
    assert computed(tmp_path / "copy") == 0
    with replaced(place / "teacher"):
        assert computed(place / "teacher") == 4
    assert computed(place / "model") == 4


# What an identity is.


def test_every_tensor_is_sampled(place: Path, monkeypatch) -> None:
    """Where nothing is hashed whole, another value of any one tensor is noticed."""
    file = place / "model" / "model.safetensors"
    whole = identity.identify_model(place / "model")
    monkeypatch.setattr(identity, "WHOLE", -1)
    monkeypatch.setattr(identity, "BLOCK", 64)
    monkeypatch.setattr(identity, "SPACING", 1 << 20)
    before, values = identity.identify_model(place / "model"), load_file(file)
    assert before != whole and before["config.json"] == whole["config.json"]
    assert before["model.safetensors"].startswith(identity.SAMPLED)

    for name, value in values.items():
        save_file(values | {name: value + 1}, file, {"format": "pt"})
        change = find_change(before, identity.identify_model(place / "model"))
        assert change.startswith("model.safetensors was"), name
    save_file(values, file, {"format": "pt"})
    assert not find_change(before, identity.identify_model(place / "model"))


def test_large_models_cost_little(tmp_path: Path, monkeypatch) -> None:
    """Of 64 GB in two tensors about a part in three thousand is read."""
    file, size = tmp_path / "model.safetensors", 1 << 35
    rows = {
        name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size]}
        for name, start in (("a", 0), ("b", size))
    }
    head = json.dumps(rows).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(file, 8 + len(head) + 2 * size)
    (tmp_path / "config.json").write_text("{}")

    read, seen = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *given: seen.append(given[1]) or read(*given))
    found = identity.identify_model(tmp_path)["model.safetensors"]
    assert found.startswith(identity.SAMPLED) and 0 < sum(seen) < size / 200


def test_an_identity_has_no_path_and_no_time(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "linear", tmp_path / "copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    before = identity.identify_model(place / "linear")
    assert identity.identify_model(copy) == before
    # Neither a model card nor a lost lineage makes it another model; a tokenizer does.
    (copy / "README.md").write_text("other")
    (copy / "lineage.json").unlink()
    assert not find_change(before, identity.identify_model(copy))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    change = find_change(before, identity.identify_model(copy))
    assert change.startswith("tokenizer.json was ")


def test_a_hash_is_remembered_only_for_the_same_file(tmp_path: Path) -> None:
    """Size and modification time alone would take the second content for the first."""
    file = tmp_path / "file"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))
        assert identity.identify_file(file) == identity.sha256(file)
        assert (
            identity.identify_files([file])["file 1"]
            == __import__("hashlib").sha256(content).hexdigest()
        )


# NaN, infinity and overflow.


def poisoned(place: Path, value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
    """The model with three numbers replaced."""
    file = place / "model" / "model.safetensors"
    values = load_file(file)
    values[name].view(-1)[5:8] = value
    save_file(values, file, {"format": "pt"})
    return place / "model"


COMMANDS: dict[str, Callable[[Path], Words]] = {
    "grow": lambda of: ("grow", of / "model", of / "out", "--ffn", 80),
    "linearize": lambda of: ("linearize", of / "model", of / "out", "--keep", "0"),
    "train": lambda of: (
        *("train", of / "model", of / "out", "--stage", "next", "--data", of / "text.txt"),
        *TRAINING,
    ),
}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_sources_that_are_not_finite_are_refused(
    verb: str, value: float, place: Path, capsys
) -> None:
    poisoned(place, value)
    counts = "3 NaN and 0 infinite" if value != value else "0 NaN and 3 infinite"
    line = last_line(capsys, *COMMANDS[verb](place))
    assert "tensor 'model.layers.1.mlp.up_proj.weight' in" in line and counts in line
    assert not (place / "out" / "config.json").exists()


@pytest.mark.parametrize("verb", ["grow", "linearize"])
def test_allow_nonfinite(verb: str, place: Path, capsys) -> None:
    """Written as they are, and noted; a lineage without the flag has no such note."""
    poisoned(place, float("inf"))
    as_json(capsys, *COMMANDS[verb](place), "--allow-nonfinite")
    out = place / "out"
    assert json.loads((out / "lineage.json").read_text())["allow_nonfinite"] is True
    assert sum(int(value.isinf().sum()) for value in load_file(out / "model.safetensors").values())
    assert "allow_nonfinite" not in json.loads((place / "linear" / "lineage.json").read_text())


def test_train_takes_what_is_not_finite_and_not_used(place: Path, capsys) -> None:
    """The embedding of a token that the text never has."""
    poisoned(place, float("nan"), "model.embed_tokens.weight")
    as_json(capsys, *COMMANDS["train"](place), "--allow-nonfinite")
    assert load_file(place / "out" / "model.safetensors")["model.embed_tokens.weight"].isnan().any()


def test_plan_says_whether_it_looked(place: Path, capsys) -> None:
    words = ("plan", place / "model", "--mixer", "gla")
    assert as_json(capsys, *words)["nonfinite"] is None
    assert as_json(capsys, *words, "--scan")["nonfinite"] == {}
    poisoned(place, float("nan"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert as_json(capsys, *words, "--scan")["nonfinite"] == {name: {"nan": 3, "infinite": 0}}
    cli.main([str(word) for word in words])
    assert "No values were read: --scan" in capsys.readouterr().out
    cli.main([str(word) for word in (*words, "--scan")])
    assert f"{name} holds 3 NaN and 0 infinite numbers" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e20, -7e4])
def test_a_cast_that_overflows_is_an_error(value: float, place: Path, capsys) -> None:
    poisoned(place, value)
    words = (*COMMANDS["grow"](place), "--dtype")
    line = last_line(capsys, *words, "float16", "--allow-nonfinite")
    assert f"tensor 'model.layers.1.mlp.up_proj.weight' holds {value:g}, beyond" in line
    assert not [path for path in place.iterdir() if path.name.startswith((".out", "out"))]
    as_json(capsys, *words, "bfloat16")


def test_trained_values_that_overflow(tmp_path: Path) -> None:
    model = tiny("llama")[1]
    model.half().save_pretrained(tmp_path / "half")
    checkpoint = Checkpoint.open(tmp_path / "half")
    values = {
        checkpoint.names[key]: lazy.read().float() for key, lazy in checkpoint.tensors.items()
    }
    name = random.Random(0).choice(sorted(values))
    values[name].view(-1)[0] = 65519.0  # rounds to the largest float16
    checkpoint.with_values(values, {"step": "Train"}).save(tmp_path / "fits")
    values[name].view(-1)[0] = 65520.0
    with pytest.raises(RegraftError, match=f"'{name}' holds 65520, beyond"):
        checkpoint.with_values(values, {"step": "Train"}).save(tmp_path / "out")
    values[name].view(-1)[0] = numpy.nan
    with pytest.raises(RegraftError, match=f"new tensor '{name}' holds NaN or infinity .1 NaN"):
        checkpoint.with_values(values, {"step": "Train"}).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
