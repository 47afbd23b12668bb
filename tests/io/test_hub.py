"""Models by their name on the hub: what is fetched, what is said, and what is pushed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.hub import Client, HubServer, Repository, commit_of
from helpers.tiny import save_model
from safetensors.torch import load_file, save_file

from regraft.core.checkpoint import Checkpoint
from regraft.io import hub
from regraft.io.files import check_inside

LARGE = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A model in two shards, with what is on the hub beside it."""
    whole = save_model(place / "whole")
    folder = place / "model"
    Checkpoint.open(whole).save(folder, shard_bytes=200_000)
    for name in ("lineage.json", ".regraft.json"):
        (folder / name).unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"other weights")
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[HubServer]:
    (place / "empty").mkdir()
    with HubServer(place / "empty") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HubServer, place: Path) -> Iterator[Client]:
    with Client(server.url, place / "home") as client:
        yield client


@pytest.fixture
def served(server: HubServer, client: Client, model: Path) -> Repository:
    """The model as org/tiny, with an empty cache and nothing counted."""
    server.models["org/tiny"] = Repository({"main": model})
    server.forget()
    client.forget()
    return server.models["org/tiny"]


def shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("model-*.safetensors"))


def refused(client: Client, *words: object, **options: object) -> str:
    code, out, err = client.run(*words, **options)
    lines = [line for line in err.splitlines() if not re.search(r"· \d:\d\d used", line)]
    assert code == 2 and out == "" and len(lines) == 1, (code, out, err)
    return lines[0]


def test_plan_reads_headers_and_no_weights(served, server, client, model, monkeypatch):
    code, out, err = client.run("plan", "org/tiny", "--ffn", 96, "--json")
    assert code == 0, err
    assert json.loads(out)["source"] == Checkpoint.open(model).sizes
    assert len(shards(model)) == 2
    for name in shards(model):
        assert server.ranges[name] == [f"bytes=0-{hub.FIRST_BYTES - 1}"]
    assert not set(server.sent) & {"pytorch_model.bin", "model.fp16.safetensors"}
    assert not list(client.cache.rglob("*.safetensors"))


def test_grow_fetches_the_shards_alone_and_works_without_network(served, server, client, place):
    out = place / "grown"
    code, _, err = client.run("grow", "org/tiny", out, "--ffn", 96)
    assert code == 0, err
    assert "org/tiny@" in client.run("grow", "org/tiny", out, "--ffn", 96)[1]
    folder = served.revisions["main"]
    assert set(server.sent) == {
        *shards(folder),
        *(file.name for file in folder.iterdir() if file.suffix in (".json", ".md", ".jinja")),
    }
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["source"]["hub"] == f"org/tiny@{commit_of(folder)}"
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/tiny" and head["license"] == "mit"

    server.forget()
    for words in (["check", "org/tiny", out], ["plan", "org/tiny", "--layers", 5]):
        code, _, err = client.run(*words, offline=True)
        assert code == 0, err
    assert not server.sent


def test_a_folder_wins_over_a_name(served, server, client, model, place):
    shutil.copytree(model, place / "org" / "tiny")
    code, _, err = client.run("plan", place / "org" / "tiny", "--ffn", 96)
    assert code == 0, err
    assert not server.sent and not hub.names_model(place / "org" / "tiny")
    assert hub.names_model("org/tiny@refs/pr/1") and not hub.names_model("/org/tiny")


def test_a_revision(served, server, client, model, place):
    other = place / "other"
    if not other.exists():
        save_model(other, layers=2)
    served.revisions["v2"] = other
    for name, layers in (("org/tiny@v2", 2), (f"org/tiny@{commit_of(other)}", 2), ("org/tiny", 4)):
        code, out, err = client.run("plan", name, "--ffn", 96, "--json")
        assert code == 0, err
        assert json.loads(out)["source"]["depth"] == layers
    line = refused(client, "plan", "org/tiny@v3", "--ffn", 96)
    assert "cannot fetch 'org/tiny@v3'" in line and "give a branch, tag or commit" in line


def test_a_cut_download_goes_on(served, server, client, model):
    name = shards(model)[0]
    size = (model / name).stat().st_size
    served.cut[name] = [100, None, 70_000]  # in its header, and in the file
    code, _, err = client.run("plan", "org/tiny", "--ffn", 96, "--scan", "--json")
    assert code == 0, err
    assert f"bytes={70_000 // 2**14 * 2**14}-" in server.ranges[name]  # the client's second try
    fetched = next(client.cache.rglob(name))
    assert fetched.read_bytes() == (model / name).read_bytes()
    assert server.sent[name] <= size + hub.FIRST_BYTES + 100 + 2**14


def test_a_shard_with_another_hash_is_removed(served, server, client, model, place):
    served.wrong = {shards(model)[1]}
    line = refused(client, "grow", "org/tiny", place / "wrong", "--ffn", 96)
    assert f"'{shards(model)[1]}' of 'org/tiny@" in line and "where the hub says" in line
    assert not (place / "wrong").exists()
    served.wrong = set()
    code, _, err = client.run("grow", "org/tiny", place / "wrong", "--ffn", 96)
    assert code == 0, err


def test_what_the_hub_refuses_is_one_line_with_its_words(served, server, client):
    line = refused(client, "plan", "org/nothing", "--ffn", 96)
    assert "Repository Not Found" in line and "check the name" in line

    served.token = "right"
    assert "`hf auth login`" in refused(client, "plan", "org/tiny", "--ffn", 96)
    line = refused(client, "plan", "org/tiny", "--ffn", 96, token="wrong")
    assert "401" in line and "HF_TOKEN" in line
    assert client.run("plan", "org/tiny", "--ffn", 96, token="right")[0] == 0

    served.gated = True
    client.forget()
    line = refused(client, "plan", "org/tiny", "--ffn", 96)
    assert "restricted" in line and "ask for access" in line
    served.status, served.gated = 429, False
    line = refused(client, "plan", "org/tiny", "--ffn", 96, token="right")
    assert "429" in line and "wait a while" in line


def test_without_network_or_cache(served, client):
    line = refused(client, "plan", "org/tiny", "--ffn", 96, offline=True)
    assert "cannot fetch 'org/tiny'" in line and "unset HF_HUB_OFFLINE" in line
    served.status = 503
    assert "fetch it where" in refused(client, "plan", "org/tiny", "--ffn", 96)
    served.status = 0
    # Metadata alone is in the cache.
    assert client.run("plan", "org/tiny", "--ffn", 96)[0] == 0
    line = refused(client, "generate", "org/tiny", "a", offline=True)
    assert "is not in the cache and HF_HUB_OFFLINE is set" in line
    served.status = 503
    line = refused(client, "grow", "org/tiny", "nowhere", "--ffn", 96)
    assert "is not in the cache and the hub answers 503" in line


def test_models_in_other_formats(served, server, client, place):
    for name, words in (("model.gguf", "hf download org/tiny model.gguf"), ("a.bin", "convert")):
        folder = place / f"only-{name}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(b"weights")
        served.revisions["main"] = folder
        assert words in refused(client, "plan", "org/tiny", "--ffn", 96)


def test_push(served, server, client, place):
    out = place / "pushed"
    words = ("grow", "org/tiny", out, "--ffn", 96, "--push-to-hub", "me/grown")
    assert "HF_TOKEN" in refused(client, *words) and not out.exists()
    for _ in range(2):  # the same command again: it is there already
        code, text, err = client.run(*words, token="mine")
        assert code == 0, err
        assert f"Pushed to {server.url}/me/grown" in text
    asked = server.created[-1]
    assert asked.get("private") or asked.get("visibility") == "private", asked
    pushed = server.pushed["me/grown"]
    assert set(pushed) == {file.name for file in out.iterdir()} - {".regraft.json"}
    assert pushed[LARGE] == (out / LARGE).read_bytes()

    line = refused(client, *words[:-1], "org/tiny", token="mine")
    assert "is not of regraft" in line
    assert "give OUT too" in refused(client, "export", "org/tiny", "--push-to-hub", "me/x")


def test_a_head_beside_its_embedding_is_compared_by_its_first_numbers(served, client, place):
    """Of a model that says they are tied; all numbers are compared once the weights are there."""
    for name in ("equal", "apart"):
        folder = place / name
        save_model(folder)
        values = load_file(folder / LARGE)
        if name == "equal":
            values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
            save_file(values, folder / LARGE, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
        served.revisions["main"] = folder
        code, out, err = client.run("plan", "org/tiny", "--ffn", 96, "--json")
        assert code == 0, err
        untied = any(step["step"] == "OpenUntied" for step in json.loads(out)["steps"])
        assert untied == (name == "apart")


def test_files_that_models_of_the_cache_share(tmp_path):
    """Newer clients link a model's file on to one that models share."""
    shared, blobs = tmp_path / "blobs", tmp_path / "models--a--b" / "blobs"
    folder = tmp_path / "models--a--b" / "snapshots" / "c"
    for one in (shared, blobs, folder):
        one.mkdir(parents=True)
    (shared / "x").write_bytes(b"1")
    (blobs / "y").symlink_to(shared / "x")
    (folder / "model.safetensors").symlink_to(blobs / "y")
    with pytest.raises(Exception, match="outside of the folder"):
        check_inside(folder, folder / "model.safetensors")
    (shared / ".huggingface-shared-blobs").write_text("1")
    check_inside(folder, folder / "model.safetensors")
