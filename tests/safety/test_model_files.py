"""Models, tokenizers and texts from strangers: no code of theirs runs, nothing outside is read."""

from __future__ import annotations

import ast
import json
import os
import pickle
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import ROOT
from helpers.cli import refused, run_main
from helpers.tiny import byte_tokenizer, save_model, tiny

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.images import read_images
from regraft.data.packing import read_documents
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.modeling.meta import stock_class

EVIL = "open({sprung!r}, 'a').write('x')\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v is not None}))


def add_code(folder: Path, sprung: Path) -> None:
    """A tokenizer that only code of its own can load, and code under every likely name."""
    for name in ("tokenization_evil", "modeling_evil", "configuration_evil", "setup", "conftest"):
        (folder / f"{name}.py").write_text(EVIL.format(sprung=str(sprung)) + "class Evil: pass\n")
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(folder / "config.json", auto_map=auto)


def test_every_loading_call_refuses_remote_code() -> None:
    """GenerationConfig is data alone, its class takes no such argument."""
    found = []
    for file in (ROOT / "regraft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            if name in ("from_pretrained", "from_config") and owner != "GenerationConfig":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                said = given.get("trust_remote_code")
                # Where a person asked for it, a tokenizer's own code runs: nothing else's.
                asked = owner == "AutoTokenizer" and said == "trust_remote_code"
                assert said == "False" or asked, f"{file}:{node.lineno}"
                found.append(name)
            if name == "load" and owner in ("torch", "pickle", "numpy", "np", "yaml"):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
                safe = safe or (owner == "yaml" and ast.unparse(node.args[1]) == "PlainLoader")
                assert safe, f"{file}:{node.lineno}"
            assert name != "load_dataset" and owner != "pickle", f"{file}:{node.lineno}"
    assert set(found) == {"from_pretrained"}


WORDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "generate": lambda model, out: ["generate", model, "hello", "--tokens", 2],
    "train": lambda model, out: [
        "train", model, out, "--data", model / "text.txt", "--stage", "next", "--tokens", 64,
        "--length", 32,
    ],
    "linearize": lambda model, out: [
        "linearize", model, out, "--data", model / "text.txt", "--tokens", 640, "--length", 32,
        "--window", 8, "--keep", "every:2",
    ],
    "eval": lambda model, out: ["eval", model, "--data", model / "text.txt"],
}  # fmt: skip


@pytest.mark.parametrize("verb", WORDS)
def test_a_tokenizer_with_code_is_refused(
    verb: str, copied: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sprung = tmp_path / "sprung"
    add_code(copied, sprung)
    (copied / "text.txt").write_text("some words " * 200)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    line = refused(capsys, *WORDS[verb](copied, tmp_path / "out"))
    assert "tokenization_evil.Evil" in line and "--trust-remote-code" in line
    assert not asked and not sprung.exists()


@pytest.mark.parametrize("verb", WORDS)
def test_code_that_is_trusted_runs(
    verb: str, copied: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flag, the tokenizer's own file runs and no other; code elsewhere is not fetched."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    sprung, trap = tmp_path / "sprung", tmp_path / "trap"
    add_code(copied, trap)
    (copied / "tokenization_evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(sprung)!r}).write_text('ran')\n"
        "class Evil(PreTrainedTokenizerFast):\n    pass\n"
    )
    (copied / "text.txt").write_text("some words " * 200)
    code, _, said = run_main(capsys, *WORDS[verb](copied, tmp_path / "out"), "--trust-remote-code")
    assert code == 0, said
    assert sprung.exists() and not trap.exists()

    edit(
        copied / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["somebody/else--tokenization_evil.Evil", None]},
    )
    line = refused(capsys, *WORDS[verb](copied, tmp_path / "other"), "--trust-remote-code")
    assert "another repository" in line


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_nobody_is_asked(terminal: bool, copied: Path, tmp_path: Path) -> None:
    """As a program of its own, with "y" piped in or typed."""
    sprung = tmp_path / "sprung"
    add_code(copied, sprung)
    command = [sys.executable, "-m", "regraft", "generate", str(copied), "hello"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRUST_REMOTE_CODE": "1"}
    ours, theirs = pty.openpty() if terminal else os.pipe()[::-1]
    os.write(ours, b"y\n" * 20)
    done = subprocess.run(
        command, stdin=theirs, capture_output=True, text=True, env=environment, timeout=200
    )
    for end in (ours, theirs):
        os.close(end)
    assert done.returncode == 2 and "not run" in done.stderr and "[y/N]" not in done.stdout
    assert not sprung.exists()


def test_code_beside_a_stock_model_is_neither_run_nor_copied(copied: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    add_code(copied, sprung)
    names = (
        "tokenizer.py tokenizer_evil.so tokenizer.pkl vocab.pkl vocab.bin chat_template.py"
        " LICENSE.py LICENSE.sh tokenizer.sh tokenizer.lua tokenizer.exe vocab.dill x.model.py"
        " tokenizer.json.pyc chat_template.pickle tokenizer"
    ).split()
    for name in names:
        (copied / name).write_text("code")
    data = ("LICENSE", "LICENSE-2.0", "LICENSE.md", "vocab.txt", "tokenizer.model.v3", "a.model")
    for name in data:
        (copied / name).write_text("data")
    Checkpoint.open(copied).save(tmp_path / "out")
    assert modeling.load(copied).config.model_type == "llama"
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert not written & set(names) and written >= {*data, "tokenizer.json"}
    assert not [name for name in written if name.endswith(".py")] and not sprung.exists()


def test_own_models_load_without_their_remote_code(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "linear"
    Remix("gla", "every:2", window=0)(Checkpoint.open(model)).save(out)
    sprung = tmp_path / "sprung"
    for file in out.glob("*.py"):
        file.write_text(EVIL.format(sprung=str(sprung)))
    assert "auto_map" in json.loads((out / "config.json").read_text())
    assert modeling.load(out).config.model_type == "regraft"
    assert modeling.load_tokenizer(out)("a")["input_ids"]
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoModel", "logging", "Evil", "LlamaConfig", "GPT2LMHeadModel"])  # fmt: skip
def test_architectures_name_models_of_the_family_only(name: str) -> None:
    config = tiny("llama")[0].to_dict() | {"architectures": [name]}
    assert stock_class(config)[0].__name__ == "LlamaForCausalLM"
    assert stock_class(config | {"architectures": ["LlamaModel"]})[0].__name__ == "LlamaModel"


KERNELS = [
    {"attn_implementation": "stranger/kernel"},
    {"_attn_implementation": "stranger/kernel@v1:f"},
    {"_attn_implementation_internal": "stranger/kernel"},
    {"experts_implementation": {"": "stranger/kernel"}},
    {"text_config": {"attn_implementation": "stranger/kernel"}},
    {"subs": [{"attn_implementation": {"a": "stranger/kernel"}}]},
]


@pytest.mark.parametrize("keys", KERNELS, ids=str)
def test_configs_fetch_no_kernels(keys: dict[str, Any], copied: Path) -> None:
    edit(copied / "config.json", **keys)
    with pytest.raises(RegraftError, match="code that would be fetched and run"):
        Checkpoint.open(copied)
    with pytest.raises(RegraftError, match="code that would be fetched and run"):
        stock_class(json.loads((copied / "config.json").read_text()))


def test_stock_attention_may_be_named(copied: Path) -> None:
    edit(copied / "config.json", attn_implementation="eager")
    assert modeling.load(copied).config._attn_implementation == "eager"


def shard(folder: Path) -> None:
    """The model in shards with an index."""
    shutil.rmtree(folder)
    found = tiny("llama", vocab=300)[1]
    found.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("way", ["up", "absolute", "link", "linked folder"])
def test_weights_outside_the_folder_are_refused(way: str, copied: Path, tmp_path: Path) -> None:
    shard(copied)
    index = copied / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    first = sorted(set(table.values()))[0]
    (tmp_path / "outside").mkdir()
    target = tmp_path / "outside" / first
    (copied / first).rename(target)
    if way == "link":
        (copied / first).symlink_to(target)
    elif way == "linked folder":
        (copied / "sub").symlink_to(tmp_path / "outside")
    name = {"up": f"../outside/{first}", "absolute": str(target), "link": first}
    new = name.get(way, f"sub/{first}")
    edit(index, weight_map={k: new if v == first else v for k, v in table.items()})
    with pytest.raises(RegraftError, match="outside of the folder") as caught:
        Checkpoint.open(copied)
    assert str(target) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "config.json", "generation_config.json", "lineage.json"]
)
def test_links_that_lead_out_are_refused(name: str, copied: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    (copied / name).rename(private) if (copied / name).exists() else private.write_text("{}")
    (copied / name).symlink_to(private)
    with pytest.raises(RegraftError, match=f"{name}' leads to '.*private'"):
        Checkpoint.open(copied).save(tmp_path / "out")
    with pytest.raises(RegraftError, match="leads to"):
        modeling.load_tokenizer(copied)
    assert not (tmp_path / "out").exists()


def test_links_that_stay_inside_are_followed(copied: Path, tmp_path: Path) -> None:
    """Inside the folder, in the Hub's cache, and the folder itself."""
    plain = modeling.load(copied).state_dict()
    cache = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(copied.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (copied / "data").mkdir()
    for file in [file for file in copied.iterdir() if file.is_file()]:
        file.rename(copied / "data" / file.name)
        file.symlink_to(f"data/{file.name}")
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (copied, snapshot, tmp_path / "linked"):
        loaded = modeling.load(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in plain.items())
        assert modeling.load_tokenizer(folder)("a")["input_ids"]
        Checkpoint.open(folder).save(tmp_path / f"out-{folder.name}")
        assert (tmp_path / f"out-{folder.name}" / "tokenizer.json").is_file()

    # Another model's blobs are outside, and so are links that only look like the cache's.
    other = tmp_path / "hub" / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "config.json").unlink()
    shutil.copy(blobs / "0", other / "0")
    (snapshot / "config.json").symlink_to(other / "0")
    with pytest.raises(RegraftError, match="leads to"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "vocab", "merges", "init_inputs"])
def test_tokenizers_read_no_files_elsewhere(key: str, copied: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.json"
    private.write_text(json.dumps({"a": 0}))
    value: Any = [str(private)] if key == "init_inputs" else str(private)
    edit(copied / "tokenizer_config.json", **{key: value})
    with pytest.raises(RegraftError, match=r"private\.json"):
        modeling.load_tokenizer(copied)
    # A path of the machine where it was saved.
    value = ["/home/somebody/x"] if key == "init_inputs" else "/home/somebody/x"
    if key.endswith("_file"):
        edit(copied / "tokenizer_config.json", **{key: value})
        assert modeling.load_tokenizer(copied)("a")["input_ids"]


def make_special(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        short = Path("/tmp") / f"regraft-{os.getpid()}.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(short))
        shutil.move(short, path)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE",
     "generation_config.json", "lineage.json", "model.gguf"],
)  # fmt: skip
def test_special_files_are_refused_before_they_are_opened(
    kind: str, name: str, copied: Path, tmp_path: Path, capsys: Any
) -> None:
    make_special(kind, copied / name)
    if name == "model.gguf":
        (copied / "config.json").unlink()
    for words in (["plan", copied], ["generate", copied, "x"], ["grow", copied, tmp_path / "out"]):
        code, _, err = run_main(capsys, *words)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.npz"])
def test_special_files_are_no_texts_and_no_images(kind: str, name: str, tmp_path: Path) -> None:
    make_special(kind, tmp_path / name)
    for place in (tmp_path / name, tmp_path / "*.*", tmp_path):
        with pytest.raises(RegraftError):
            read_images(place) if name.endswith("npz") else read_documents(place)


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_texts_and_images_hold_no_objects(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    sprung = tmp_path / "sprung"
    numpy.savez(tmp_path / "a.npz", pixel_values=numpy.array([Evil(sprung)]), labels=[1])
    with pytest.raises(RegraftError, match="no readable|dtype object"):
        read_images(tmp_path / "a.npz")

    # An extension type whose metadata is a pickle.
    facts = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(sprung)),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=facts)
    table = pyarrow.table({"text": ["words"]}, pyarrow.schema([field]))
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        try:
            assert read_documents(tmp_path / name) == ["words"]
        except RegraftError as error:
            assert "\n" not in str(error)
    assert not sprung.exists()


def test_pickled_weights_are_never_read(copied: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (copied / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "model.pt", "model.safetensors"):
        (copied / name).write_bytes(pickle.dumps(Evil(sprung)))
        with pytest.raises(RegraftError):
            modeling.load(copied)
    assert not sprung.exists()
