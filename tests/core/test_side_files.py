"""Files beside the weights: each is in the output as it was, or named as left out with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import as_json, refused, run_main
from helpers.tiny import read_files, save_model, tiny, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, float32, no_grad, zeros
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import BertModel

from regraft.core import side_files
from regraft.core.checkpoint import Checkpoint
from regraft.core.side_files import OWN, find_side_files
from regraft.growth.sizes_to_steps import Growth
from regraft.io import output
from regraft.recipes import run
from regraft.train.output import RUN_NAMES, TRAINED, finish_run, publish_model

# A folder as the Hub has them: (path, whether it travels).
HUB = {
    "LICENSE": True,
    "NOTICE.txt": True,
    "USE_POLICY.md": True,
    "images/architecture.png": True,
    "tokenizer.json": True,
    "tokenizer.model.v3": True,
    "generation_config.json": True,
    "additional_chat_templates/tool_use.jinja": True,
    "evaluation/results.csv": True,
    "eval_results.yaml": True,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "model.fp16.safetensors": False,
    "tf_model.h5": False,
    "flax_model.msgpack": False,
    "rust_model.ot": False,
    "model-Q4_K_M.gguf": False,
    "onnx/model.onnx": False,
    "onnx/config.json": False,
    "original/consolidated.00.pth": False,
    "original/params.json": False,
    "modeling_x.py": False,
    "setup.sh": False,
    "libx.so.1": False,
    "vocab.pkl": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "rng_state_0.pth": False,
    "trainer_state.json": False,
    "checkpoint-500/config.json": False,
    "runs/Jan01/events.out.tfevents.1": False,
    ".git/config": False,
    ".gitattributes": False,
    "__pycache__/modeling_x.cpython-311.pyc": False,
    "metrics.jsonl": False,
    "whatever": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model", layers=1)


def copy_model(model: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")


def is_left_out(name: str, left_out: dict[str, str]) -> bool:
    """Whether a file or a folder that it lies in is named."""
    return any(str(path) in left_out for path in (Path(name), *Path(name).parents))


def check_law(source: Path, out: Path) -> dict[str, str]:
    """Every file of the source is in the output, byte by byte, or named; returns what is named."""
    lineage = json.loads((out / "lineage.json").read_text())
    left_out = lineage.get("left_out", {})
    before, after = read_files(source), read_files(out)
    replaced = OWN | {"model.safetensors"} | ({"README.md"} if "lineage.json" in before else set())
    for name, data in before.items():
        if name in replaced:
            continue
        there = after.get("README.source.md" if name == "README.md" else name)
        assert (there == data) != is_left_out(name, left_out), name
    assert all(left_out.values())
    return left_out


def test_a_folder_as_the_hub_has_them(model: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = copy_model(model, tmp_path / "source"), tmp_path / "out"
    write(source, *(name for name in HUB if not (source / name).exists()))
    plan = as_json(capsys, "plan", source)
    code, said, err = run_main(capsys, "grow", source, out, "--ffn", 60)
    assert code == 0, err
    assert "beside the weights, not copied: .git (hidden, or a cache)" in said
    left_out = check_law(source, out)
    assert left_out == plan["left_out"]
    for name, travels in HUB.items():
        assert (out / name).is_file() == travels, name

    # What is made of the output has the same files, and an output can be replaced.
    assert run_main(capsys, "grow", out, tmp_path / "next", "--layers", 2)[0] == 0
    assert not check_law(out, tmp_path / "next")
    assert run_main(capsys, "grow", source, out, "--ffn", 64, "--overwrite")[0] == 0
    assert run_main(capsys, "check", source, out)[0] == 0


NAMES = st.text("ab.-_", min_size=1, max_size=4).filter(lambda name: set(name) - {"."})
ENDINGS = ("", ".json", ".txt", ".py", ".bin", ".safetensors", ".pkl", ".png", ".x", ".so", ".MD")


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["a", "1_Pooling", "runs", ".cache", "onnx"]), max_size=5),
            NAMES,
            st.sampled_from(ENDINGS),
        ),
        max_size=8,
    )
)
def test_nothing_is_lost(model: Path, tmp_path_factory: pytest.TempPathFactory, names: Any) -> None:
    folder = tmp_path_factory.mktemp("law")
    source = copy_model(model, folder / "source")
    for folders, name, ending in names:
        path = source.joinpath(*folders, f"{name}{ending}")
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            write(source, str(path.relative_to(source)))
    Checkpoint.open(source).save(folder / "out")
    check_law(source, folder / "out")


def test_large_files_stay_behind(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    source = copy_model(model, tmp_path / "source")
    monkeypatch.setattr(side_files, "FILE_BYTES", 100_000)
    monkeypatch.setattr(side_files, "ALL_BYTES", 190_000)
    for name, size in {"a.txt": 100_001, "b.txt": 90_000, "c.txt": 95_000, "d.txt": 10}.items():
        (source / name).write_text("x" * size)
    write(source, *(f"many/{number}.txt" for number in range(1001)))
    found = find_side_files(source, 36)
    assert "b.txt" in found.copied and "d.txt" in found.copied
    assert found.left_out["a.txt"] == "large: 100,001 bytes, the limit is 100,000"
    assert "the limit is 190,000" in found.left_out["c.txt"]
    assert found.left_out["many"] == "holds more than 1,000 files"


def test_links_and_pipes_of_any_name_stay_behind(model: Path, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "source")
    write(tmp_path, "private.txt", "private/a.txt")
    (source / "notes.txt").symlink_to(tmp_path / "private.txt")
    (source / "more").symlink_to(tmp_path / "private")
    (source / "README.md").symlink_to(tmp_path / "private.txt")
    (source / "sub").mkdir()
    (source / "sub" / "tokenizer.json").symlink_to(tmp_path / "private.txt")
    (source / "inner.txt").symlink_to("tokenizer.json")
    (source / "gone.txt").symlink_to("nowhere")
    os.mkfifo(source / "pipe.txt")
    Checkpoint.open(source).save(tmp_path / "out")
    left_out = json.loads((tmp_path / "out" / "lineage.json").read_text())["left_out"]
    refused = {"notes.txt", "more", "README.md", "sub/tokenizer.json", "gone.txt", "pipe.txt"}
    assert set(left_out) == refused
    assert (tmp_path / "out" / "inner.txt").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not any(b"mine: private" in data for data in read_files(tmp_path / "out").values())


def test_a_training_puts_folders_into_place(model: Path, tmp_path: Path) -> None:
    source, out = copy_model(model, tmp_path / "source"), tmp_path / "out"
    write(source, "1_Pooling/config.json", "images/deep/a.png")
    out.mkdir()
    output.claim_folder(out, output.Marker("training", names=RUN_NAMES))
    Checkpoint.open(source).save(out / TRAINED)
    publish_model(out / TRAINED, out)
    finish_run(out, None)
    assert not check_law(source, out)
    assert output.find_foreign(out, output.read_marker(out)) is None


def test_what_a_run_writes_is_never_taken_over() -> None:
    """Else a training that publishes a model would replace its own files by the source's."""
    for name in (*RUN_NAMES, *run.NAMES, output.WORK, output.MARKER):
        tables = side_files.FILES | side_files.FOLDERS
        assert name in OWN or any(side_files.re.fullmatch(each, name) for each in tables), name


CARD = """---
license: apache-2.0
license_link: LICENSE
language: [en, de]
tags: [text-generation, "a: b"]
model-index: [{name: x}]
---
# Mine
Made with care.
"""


def test_the_source_s_card_is_kept_and_its_licence_named(model: Path, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "source")
    (source / "README.md").write_text(CARD)
    Growth(ffn=60)(Checkpoint.open(source)).save(tmp_path / "out")
    Growth(ffn=64)(Checkpoint.open(tmp_path / "out")).save(tmp_path / "next")
    for folder in (tmp_path / "out", tmp_path / "next"):
        assert (folder / "README.source.md").read_text() == CARD
        head = (folder / "README.md").read_text().split("---\n")[1]
        assert side_files.lineage.yaml.safe_load(head) == {
            "library_name": "transformers",
            "license": "apache-2.0",
            "license_link": "LICENSE",
            "language": ["en", "de"],
            "tags": ["text-generation", "a: b", "regraft"],
        }
        assert "Widen(" in (folder / "README.md").read_text()


def test_a_card_says_what_training_read() -> None:
    closed, distilled = {"kind": "closed form", "tokens": 8192}, {"kind": "distil", "tokens": 5}
    ledger = {"start": [closed], "stages": [distilled]}
    step = {"step": "Train", "arguments": {"stages": [{"kind": "distil"}]}, "ledger": ledger}
    shown = side_files.lineage.format_step(step)
    assert shown == "Train(closed form of 8,192 tokens, distil of 5 tokens)"
    # A ledger that someone else wrote ends nothing.
    assert side_files.lineage.format_step({"ledger": {"stages": [{}]}}) == "?(? of 0 tokens)"


@pytest.mark.parametrize("head", ["---\n*x\n---\n", "---\n- 1\n---\n", "---\n", "", "\xff---\n"])
def test_a_card_that_cannot_be_read_says_nothing(head: str, model: Path, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "source")
    (source / "README.md").write_bytes(head.encode("latin-1") + b"text")
    Checkpoint.open(source).save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- regraft\n---\n")


def add_code(source: Path) -> None:
    """A config and a tokenizer that name code, some of which is elsewhere."""
    auto = {"AutoConfig": "configuration_x.X", "AutoModel": "org/other--modeling_x.X"}
    for name, value in (
        ("config.json", auto),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.X", None]}),
    ):
        fields = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(fields | {"auto_map": value}))
    write(source, "configuration_x.py", "modeling_x.py", "tokenization_x.py", "kernel.so")


@pytest.mark.parametrize("verb", ["grow", "linearize"])
@pytest.mark.parametrize("copies", [False, True])
def test_auto_map_names_only_code_that_is_there(
    copies: bool, verb: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    source, out = copy_model(model, tmp_path / "source"), tmp_path / "out"
    add_code(source)
    words = ["--ffn", 60] if verb == "grow" else ["--mixer", "gla", "--keep", "none"]
    code, said, err = run_main(
        capsys, verb, source, out, *words, *(["--copy-code"] if copies else [])
    )
    assert code == 0, err
    assert ("auto_map of config.json" in said) and "--copy-code" in said
    assert ("tokenizer_config.json" in said) != copies
    outs = [out]
    if verb == "grow":  # once copied, code stays with what is made from it
        Growth(ffn=64)(Checkpoint.open(out)).save(tmp_path / "next")
        outs.append(tmp_path / "next")
    for folder in outs:
        assert (folder / "tokenization_x.py").is_file() == copies
        assert not (folder / "kernel.so").exists()
        for file in folder.rglob("*.json"):
            for reference in auto_maps(json.loads(file.read_text())):
                assert (folder / f"{reference.rpartition('.')[0]}.py").is_file(), reference
        kept = json.loads((folder / "tokenizer_config.json").read_text()).get("auto_map")
        assert (kept is not None) == copies
    left_out = json.loads((out / "lineage.json").read_text())["left_out"]
    assert ("modeling_x.py" in left_out) != copies and left_out["kernel.so"] == "code"


def auto_maps(value: Any) -> list[str]:
    """Every reference to code in a JSON value."""
    if isinstance(value, list):
        return [found for item in value for found in auto_maps(item)]
    if not isinstance(value, dict):
        return []
    found = [one for key, item in value.items() if key != "auto_map" for one in auto_maps(item)]
    for reference in (value.get("auto_map") or {}).values():
        found += [one for one in (reference if isinstance(reference, list) else [reference]) if one]
    return found


def sentence_transformer(folder: Path, *modules: tuple[str, str], inner: str = "") -> Path:
    """A folder of sentence-transformers; `modules` are (folder, class) behind the transformer."""
    tiny("bert", architecture="BertModel")[1].save_pretrained(folder)
    package = "sentence_transformers.models."
    rows = [{"idx": 0, "name": "0", "path": inner, "type": f"{package}Transformer"}]
    for number, (path, kind) in enumerate(modules, 1):
        rows.append({"idx": number, "name": str(number), "path": path, "type": package + kind})
        (folder / path).mkdir()
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    pooling = {"word_embedding_dimension": 72, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@no_grad()
def embed(folder: Path) -> Tensor:
    """Mean-pooled embeddings of three rows of tokens, (rows, hidden)."""
    model = BertModel.from_pretrained(folder, dtype=float32).eval()
    return model(input_ids=tokens(3, 9)).last_hidden_state.mean(1)


PLAIN = (("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
DENSE = (("1_Pooling", "Pooling"), ("2_Dense", "Dense"))


def test_a_sentence_transformer_keeps_its_modules(tmp_path: Path, capsys: Any) -> None:
    source = sentence_transformer(tmp_path / "source", *PLAIN)
    code, said, err = run_main(capsys, "grow", source, tmp_path / "wide", "--hidden", 144)
    assert code == 0, err
    assert "1_Pooling/config.json gets the width 144" in said
    pooling = json.loads((tmp_path / "wide" / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": 144, "pooling_mode_mean_tokens": True}
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (tmp_path / "wide" / name).read_bytes() == (source / name).read_bytes()
    vectors = embed(source), embed(tmp_path / "wide")
    assert vectors[1].shape[1] == 144
    cosines = [unit @ unit.T for unit in (normalize(each) for each in vectors)]
    assert_close(cosines[1], cosines[0])
    Growth(layers=4)(Checkpoint.open(source)).save(tmp_path / "deep")
    assert not check_law(source, tmp_path / "deep")


def test_a_dense_module_comes_along_or_is_refused(tmp_path: Path, capsys: Any) -> None:
    source = sentence_transformer(tmp_path / "source", *DENSE)
    (source / "2_Dense" / "config.json").write_text('{"in_features": 72, "out_features": 5}')
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    line = refused(capsys, "grow", source, tmp_path / "deep", "--layers", 4)
    assert "2_Dense/pytorch_model.bin' is a pickle" in line and "model.safetensors" in line
    save_file({"linear.weight": zeros(5, 72)}, source / "2_Dense" / "model.safetensors")
    Growth(layers=4)(Checkpoint.open(source)).save(tmp_path / "deep")
    assert set(check_law(source, tmp_path / "deep")) == {"2_Dense/pytorch_model.bin"}
    line = refused(capsys, "grow", source, tmp_path / "wide", "--hidden", 144)
    assert "'2_Dense' (Dense)" in line and "width 72, the result gives 144" in line
    assert not (tmp_path / "wide").exists()


def test_a_transformer_in_a_folder_of_its_own_is_named(tmp_path: Path, capsys: Any) -> None:
    source = sentence_transformer(tmp_path / "source", *PLAIN, inner="0_BERT")
    line = refused(capsys, "grow", source, tmp_path / "out", "--layers", 4)
    assert "has its transformer in '0_BERT'" in line
    (source / "config.json").unlink()
    assert "has its transformer in '0_BERT'" in refused(capsys, "plan", source)
    rows = json.loads((source / "modules.json").read_text())
    rows[0]["path"], rows[1]["path"] = "", "../elsewhere"
    (source / "modules.json").write_text(json.dumps(rows))
    assert "has a module in '../elsewhere'" in refused(capsys, "plan", source)
