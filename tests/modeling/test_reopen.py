"""A model that was written is opened before it is put in place; one that cannot be is not put there."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_main
from helpers.tiny import ARCHITECTURES, CONFIGS, byte_tokenizer, save_model, tiny, write_text

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.modeling import reopen

ROOT = Path(__file__).resolve().parents[2]
REFUSAL = "what was written cannot be opened .*nothing was published, report this"
CLASSES = [
    (name, architecture) for name in CONFIGS for architecture in ARCHITECTURES.get(name, [None])
]


@pytest.mark.parametrize(("family", "architecture"), CLASSES, ids=str)
def test_every_class_opens_as_it_is_stored(
    family: str, architecture: str | None, tmp_path: Path
) -> None:
    dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][len(family) % 4]
    _, model = tiny(family, architecture=architecture)
    model.to(dtype).save_pretrained(tmp_path / "model")
    threads, verbose = torch.get_num_threads(), torch.is_grad_enabled()
    reopen.prove_opens(tmp_path / "model")
    assert (threads, verbose) == (torch.get_num_threads(), torch.is_grad_enabled())


def with_config(**keys: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda made: replace(made, config=made.config | keys)


def rename_one(made: Checkpoint) -> Checkpoint:
    key = ("norm.final.weight", None)
    return replace(made, names=made.names | {key: "model.another.weight"})


def reshape_one(made: Checkpoint) -> Checkpoint:
    key = ("norm.final.weight", None)
    lazy = made.tensors[key]
    short = replace(lazy, shape=(5,), read=lambda: lazy.read()[:5].clone())
    return replace(made, tensors=made.tensors | {key: short})


def break_host(made: Checkpoint) -> Checkpoint:
    return replace(made, config=made.config | {"slot": "model.layers.{}.no_such_module"})


BROKEN: dict[str, tuple[Callable[[Checkpoint], Checkpoint], bool]] = {
    "activation": (with_config(hidden_act="no_such_function"), False),
    "rotary": (with_config(rope_parameters={"rope_type": "no_such_type"}), False),
    "name": (rename_one, False),
    "shape": (reshape_one, False),
    "heads": (with_config(num_attention_heads=8, num_key_value_heads=3), False),
    "slot": (break_host, True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_opened_is_not_published(name: str, tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    spoil, linear = BROKEN[name]
    made = Remix(keep="1")(source) if linear else source
    with pytest.raises(RegraftError, match=REFUSAL):
        reopen.save_model(spoil(made), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    # The same call starts over, and what it would replace stays until the new one opens.
    reopen.save_model(made, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(RegraftError, match=REFUSAL):
        reopen.save_model(spoil(made), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("change", ["lost", "added", "reshaped"])
def test_tensors_and_class_must_match(change: str, tmp_path: Path) -> None:
    """What transformers would fill in at random or leave out, with a warning."""
    tiny("mixtral")[1].save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    key = ("mlp.1.up.weight", 2)
    tensors, names = dict(checkpoint.tensors), dict(checkpoint.names)
    if change == "lost":
        del tensors[key]
    elif change == "added":
        tensors["extra", None], names["extra", None] = tensors[key], "model.extra.weight"
    else:
        tensors["norm.mlp.weight", 0] = replace(tensors["norm.mlp.weight", 0], shape=(3,))
    reopen.load_outline(checkpoint)
    # transformers itself stops where it cannot join what there is of the experts.
    with pytest.raises(RuntimeError if change == "lost" else RegraftError):
        reopen.load_outline(replace(checkpoint, tensors=tensors, names=names))


def test_large_models_with_experts_are_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(reopen, "run_briefly", lambda one: ran.append(one.anatomy.family))
    for family in ("llama", "mixtral"):
        tiny(family)[1].save_pretrained(tmp_path / family)
        reopen.prove_opens(tmp_path / family)
        monkeypatch.setattr(reopen, "JOINED_BYTES", 1000)
        reopen.prove_opens(tmp_path / family)
        monkeypatch.undo()
        monkeypatch.setattr(reopen, "run_briefly", lambda one: ran.append(one.anatomy.family))
    assert ran == ["llama", "llama", "mixtral"]


VERBS = {
    "grow": "grow {model} {out} --layers 5",
    "linearize": "linearize {model} {out} --keep 0 --window 8",
    "linearize and train": "linearize {model} {out} --data {text} --tokens 256 --length 32 --keep 0 --window 8",
    "train": "train {model} {out} --data {text} --stage next --tokens 64 --length 32",
    "train layer by layer": "train {linear} {out} --teacher {model} --data {text} --stage align"
    " --tokens 64 --length 32 --stream",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reopen")
    paths = {"model": save_model(folder / "model"), "linear": folder / "linear"}
    Remix(keep="0", window=8)(Checkpoint.open(paths["model"])).save(paths["linear"])
    byte_tokenizer().save_pretrained(paths["linear"])
    return paths | {"text": write_text(folder / "text.txt", documents=6)}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_open_what_they_wrote(
    verb: str,
    inputs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "config.json").is_file() and (folder / "lineage.json").is_file()
        raise RegraftError(f"{folder.name} does not open")

    out = tmp_path / "out"
    words = VERBS[verb].format(**inputs, out=out).split()
    with monkeypatch.context() as patched:
        patched.setattr(reopen, "prove_opens", fail)
        code, _, said = run_main(capsys, *words)
        assert code == 2 and said.strip().endswith("does not open"), said
    assert not (out / "config.json").exists()

    if verb == "linearize and train":
        return  # tests/linearize/test_methods.py runs it to its end
    # The same command, where it opens.
    code, _, said = run_main(capsys, *words)
    assert code == 0, said
    reopen.prove_opens(out)
    shutil.rmtree(out)
    assert not list(tmp_path.iterdir())


def test_no_verb_writes_a_model_otherwise() -> None:
    """`Checkpoint.save` alone does not open what it wrote."""
    states = {"state", "self.state", "self", "dcp", "journal"}
    for folder in ("cli", "compare", "linearize", "recipes", "train"):
        for file in (ROOT / "regraft" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = ast.unparse(node.func.value)
                    assert node.func.attr != "save" or owner in states, f"{file}:{node.lineno}"
