"""Counts, depths and sizes that no model or text has: one line at once, in little memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from helpers import ROOT
from helpers.cli import refused
from helpers.gguf_model import write_gguf
from helpers.tiny import byte_tokenizer, save_model, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from regraft.core.checkpoint import Checkpoint
from regraft.core.config_checks import MAX_COUNT, MAX_LAYERS, MAX_SIZE
from regraft.data.corpus import TextMixture
from regraft.data.documents import LONG_BLANK, PIECE
from regraft.data.files import CHUNK, XZ_MEMORY
from regraft.data.images import read_images
from regraft.data.packing import read_documents
from regraft.data.text import MAX_LINE_BYTES, Text
from regraft.errors import RegraftError
from regraft.io import files, gguf_header, linux, safetensors

BILLION = 10**9


def edit(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a million layers": ("llama", {"num_hidden_layers": 10**6}, f"limit is {MAX_LAYERS:,}"),
    "more layers than tensors": ("llama", {"num_hidden_layers": 400}, "400 layers, the files hold"),
    "layers that make a list": (
        "gemma2",
        {"num_hidden_layers": BILLION, "layer_types": None},
        f"depth {BILLION}: the limit",
    ),
    "experts": ("mixtral", {"num_local_experts": BILLION}, "expert 1000000000: the limit"),
    "labels": ("llama", {"num_labels": BILLION}, f"num_labels = {BILLION}: the limit is {MAX_COUNT:,}"),
    "vocabulary": ("llama", {"vocab_size": BILLION}, f"vocab {BILLION}: the limit is {MAX_SIZE:,}"),
    "image": ("vit", {"image_size": BILLION}, "pos .* the limit is"),
    "rotary share": ("llama", {"partial_rotary_factor": 1e9}, "a share above 0 and at most 1"),
    "rotary share inside": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1e9}},
        "rope_parameters.partial_rotary_factor",
    ),
    "no period": ("gemma3_text", {"sliding_window_pattern": 0}, "must be positive"),
    "a string": ("llama", {"hidden_size": "36"}, "hidden_size is '36', not a whole number"),
    "true": ("llama", {"num_attention_heads": True}, "num_attention_heads is True, not a whole"),
    "not finite": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a finite"),
}  # fmt: skip


def test_experts_in_one_tensor_are_no_tensors_each(tmp_path: Path) -> None:
    """gpt-oss has more experts in all its layers than it has tensors."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 64}
    GraniteMoeForCausalLM(GraniteMoeConfig(**sizes, **heads)).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    assert source.sizes["expert"] * source.layers > len(source.tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path) -> None:
    family, keys, message = CONFIGS[name]
    tiny(family)[1].save_pretrained(tmp_path)
    edit(tmp_path, **keys)
    with pytest.raises(RegraftError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_position_embeddings": 10**9},  # rotary positions take no table
        {"rope_theta": 10**10},
        {"num_labels": 1000},
        {"of_tomorrow": {"any": [1, None]}},
        {"id2label": None, "sliding_window": None, "rope_scaling": None},
        {"time_step_limit": [0.0, float("inf")]},  # Mamba's configs have it
        {"eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_configs_that_are_fine(keys: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path)
    edit(tmp_path, **keys)
    assert Checkpoint.open(tmp_path).layers == 3


JSON: dict[str, tuple[str, str]] = {
    "deep": ("[" * 100_000 + "]" * 100_000, f"nested deeper than {files.JSON_DEPTH}"),
    "deep enough for Python": ('{"a":' * 200 + "1" + "}" * 200, "nested deeper"),
    "digits": ('{"hidden_size": ' + "9" * 100_000 + "}", "digits"),
    "two values": ('{"a": 1, "a": 2}', "key 'a' has two values"),
    "brackets": ("[" + "[]," * 50 + "[]]", "51? ?brackets|52 brackets"),
    "not UTF-8": ("\udcff", "is not JSON"),
}


@pytest.mark.parametrize("name", JSON)
def test_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = JSON[name]
    if name == "brackets":
        monkeypatch.setattr(files, "JSON_PARTS", 50)
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RegraftError, match=message) as caught:
        files.read_json(tmp_path / "a.json", Any)
    assert len(str(caught.value)) < 500


def test_json_of_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_BYTES", 1000)
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(RegraftError, match="has more than 1,000 bytes of JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(RegraftError, match="is no plain file"):
        files.read_json(Path("/dev/zero"))
    monkeypatch.setattr(files, "LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{}\n{"a": "' + "x" * 1000)
    with pytest.raises(RegraftError, match="line 2 has more than 100 bytes"):
        files.read_json_lines(tmp_path / "a.jsonl", Any)


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
))  # fmt: skip
def test_json_that_is_fine_comes_back(value: Any) -> None:
    text = json.dumps(value).encode()
    assert files.parse_json(text, "a file", "") == json.loads(text)


def test_a_newer_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "time.json").write_text('{"version": 2, "seconds": "of another kind"}')
    with pytest.raises(RegraftError, match="version is 2, .* reads version 1: update regraft"):
        files.read_json_if_exists(tmp_path / "time.json", dict[str, float])
    (tmp_path / "time.json").write_text('{"version": 1, "seconds": 1}')
    assert files.read_json_if_exists(tmp_path / "time.json", dict[str, float])["seconds"] == 1


def write_header(file: Path, table: Any, data: bytes = b"") -> None:
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_headers(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    row = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(file, {"a": row}, bytes(8))
    assert [entry.shape for entry in safetensors.read_header(file)] == [(2,)]
    wrong: list[tuple[Any, str]] = [
        ({"shape": [2**40, 2**40]}, "cut short or damaged"),
        ({"shape": [10**400]}, "not a whole number"),
        ({"shape": [-1, -2]}, "damaged"),
        ({"shape": [1] * 65 + [2]}, "damaged"),
        ({"shape": "2"}, r"a.shape is '2', not a list"),
        ({"data_offsets": [0, 8, 8]}, "a.data_offsets is"),
        ({"data_offsets": [0, True]}, "data_offsets"),
    ]
    for change, message in wrong:
        write_header(file, {"a": row | change}, bytes(8))
        with pytest.raises(RegraftError, match=message):
            safetensors.read_header(file)
    file.write_bytes(struct.pack("<Q", safetensors.HEADER_LIMIT + 1))
    with file.open("r+b") as stream:
        stream.truncate(safetensors.HEADER_LIMIT + 100)  # a hole, which takes no disk
    with pytest.raises(RegraftError, match="header of 25,000,001 bytes, more than the limit"):
        safetensors.read_header(file)


def test_a_lack_of_memory_says_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("Cannot allocate memory (os error 12)")

    write_header(
        tmp_path / "a", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    )
    entry = safetensors.read_header(tmp_path / "a")[0]
    monkeypatch.setattr(safetensors, "safe_open", fail)
    with pytest.raises(RegraftError, match="Cannot allocate memory.*there is not enough memory"):
        entry.read()
    monkeypatch.setattr(safetensors, "free_memory", lambda: 5)
    with pytest.raises(RegraftError, match="needs 8 bytes of memory, there are 5"):
        entry.read()
    assert linux.free_memory() is None or linux.free_memory() > 10**6


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config, model = tiny("llama", hidden=72, layers=1)
    file = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(file, model, config)
    gguf_header.check_header(file)
    return file.read_bytes()


@pytest.mark.parametrize(
    ("key", "skip", "value", "message"),
    [
        (b"llama.block_count", 4, struct.pack("<I", BILLION), "block_count = 1000000000 for 12"),
        (b"tokenizer.ggml.tokens", 8, struct.pack("<Q", 10**15), "which the file has no room for"),
        (b"tokenizer.ggml.tokens", 4, struct.pack("<I", 9), "kind 8|no room|kind"),
        (b"general.architecture", 4, struct.pack("<Q", 10**15), "string of"),
        (b"GGUF", 4, struct.pack("<Q", 10**15), "no room for"),
        (b"GGUF", 12, struct.pack("<Q", 10**15), "no room for"),
        (b"GGUF", 0, struct.pack("<I", 77), "version 77"),
    ],
)
def test_gguf_headers(
    key: bytes, skip: int, value: bytes, message: str, gguf: bytes, tmp_path: Path
) -> None:
    at = gguf.index(key) + len(key) + skip
    (tmp_path / "a.gguf").write_bytes(gguf[:at] + value + gguf[at + len(value) :])
    with pytest.raises(RegraftError, match=message):
        Checkpoint.open(tmp_path / "a.gguf")


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", layers=1)
    for flag, value in {
        "--layers": 10**6,
        "--hidden": 10**12,
        "--ffn": 10**11,
        "--heads": 10**12,
    }.items():
        assert "the limit is" in refused(capsys, "plan", model, flag, value)
    (tmp_path / "target").mkdir()
    config = json.loads((model / "config.json").read_text())
    for key, value in {"num_hidden_layers": 10**6, "hidden_size": BILLION}.items():
        (tmp_path / "target" / "config.json").write_text(json.dumps(config | {key: value}))
        assert "the limit is" in refused(capsys, "plan", model, "--to", tmp_path / "target")


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
}  # fmt: skip
LIMIT = 5000


def rows_of(file: Path, **options: Any) -> Any:
    texts = TextMixture([Text(str(file), max_line_bytes=LIMIT, **options)], byte_tokenizer())
    texts(4)
    return texts.facts()[0]


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("form", [".jsonl", ".txt"])
@pytest.mark.parametrize("where", ["first", "middle", "last", "without an end"])
def test_a_long_line_is_refused_or_left_out(
    pack: str, form: str, where: str, tmp_path: Path
) -> None:
    words = [f"Words {n}. " * 9 for n in range(4)]
    good = [json.dumps({"text": word}) if form == ".jsonl" else word + "\n\n" for word in words]
    long = json.dumps({"text": "x" * 3 * CHUNK}) if form == ".jsonl" else "x" * 3 * CHUNK + "\n\n"
    at = {"first": 0, "middle": 2}.get(where, 4)
    lines = [*good[:at], long, *good[at:]]
    text = "\n".join(lines) + "\n"
    file = tmp_path / f"a{form}{pack}"
    file.write_bytes(PACK[pack]((text.rstrip() if where == "without an end" else text).encode()))

    number = 1 + text[: text.index("xxx")].count("\n")
    message = f"line {number} has more than 5,000 bytes: split it, or raise .*--max-line-bytes"
    with pytest.raises(RegraftError, match=message):
        rows_of(file)
    facts = rows_of(file, skip_bad=True)
    assert facts["bad_lines"] == 1
    # Of a line in a .txt, what fits is read before it is known how long the line is.
    if form == ".jsonl":
        assert facts["documents"] == 4 and facts["text_bytes"] == sum(map(len, words))


def test_the_limit_of_a_line_can_be_raised_after_it_stopped_a_run(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text(json.dumps({"text": "words " * 1000}) + "\n")
    with pytest.raises(RegraftError, match="line 1 has more than 5,000 bytes"):
        TextMixture([Text(str(file), max_line_bytes=LIMIT)], byte_tokenizer(), cache=cache)(8)
    raised = TextMixture([Text(str(file), max_line_bytes=10_000)], byte_tokenizer(), cache=cache)
    assert len(raised(8)) > 100 and Text("a", max_line_bytes=5).__repr__() == repr(Text("a"))


def test_a_run_that_stopped_within_a_long_line_stops_there_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("words " * (CHUNK // 2))
    limit = 5 * CHUNK // 2
    for _ in range(2):
        texts = TextMixture(
            [Text(str(file), max_line_bytes=limit)], byte_tokenizer(), cache=tmp_path / "cache"
        )
        with pytest.raises(RegraftError, match=f"line 1 has more than {limit:,} bytes"):
            texts(8)


def test_blanks_do_not_pile_up() -> None:
    assert (
        LONG_BLANK.sub(r"\1", "a" + " \u3000" * PIECE + "b")
        == "a" + (" \u3000" * PIECE)[:PIECE] + "b"
    )
    assert LONG_BLANK.sub(r"\1", "a" + " " * PIECE + "b") == "a" + " " * PIECE + "b"


def test_xz_in_little_memory(tmp_path: Path) -> None:
    plain = (json.dumps({"text": "words and words"}) + "\n").encode() * 50
    several = lzma.compress(plain) + bytes(8) + lzma.compress(plain)
    (tmp_path / "a.jsonl.xz").write_bytes(several)
    assert len(read_documents(tmp_path / "a.jsonl.xz")) == 100
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2 * XZ_MEMORY, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "depth": 1, "nice_len": 2}]  # fmt: skip
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(plain, filters=filters))
    with pytest.raises(RegraftError, match="cannot be read beyond line 0 .*[Mm]emory"):
        read_documents(tmp_path / "b.jsonl.xz")


def test_tables_that_expand(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["x" * 20_000_000, "fine words"]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(RegraftError, match="rows 1 to 2 cannot be read .* more than 200 to 1"):
        rows_of(tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet", compression="none")
    with pytest.raises(RegraftError, match="row 1 has more than 5,000 bytes"):
        rows_of(tmp_path / "b.parquet")
    assert rows_of(tmp_path / "b.parquet", skip_bad=True)["documents"] == 1


def test_images_that_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.npz"
    arrays = {"pixel_values": numpy.zeros((3, 1, 100, 100), "float32"), "labels": numpy.arange(3)}
    numpy.savez_compressed(file, **arrays)
    assert len(read_images(file)) == 3
    monkeypatch.setattr("regraft.data.images.MAX_PACKED_BYTES", 1000)
    with pytest.raises(RegraftError, match="120,000 bytes .* compressed more than 200 to 1"):
        read_images(file)
    numpy.savez(file, **arrays)
    assert len(read_images(file)) == 3
    monkeypatch.setattr("regraft.data.images.free_memory", lambda: 1000)
    with pytest.raises(RegraftError, match="needs 120,000 bytes of memory"):
        read_images(file)
    numpy.savez(file, **(arrays | {"labels": numpy.array([{}, 1, 2])}))
    with pytest.raises(RegraftError, match="a.npz"):
        read_images(file)


BOMBS = """
import resource, sys
from helpers.tiny import byte_tokenizer
from regraft.data.corpus import TextMixture
from regraft.data.text import Text
from regraft.errors import RegraftError

tokenizer = byte_tokenizer()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 1_000_000_000,) * 2)
for file in sys.argv[1:]:
    try:
        TextMixture([Text(file)], tokenizer)(32)
    except RegraftError as error:
        print(error)
"""


@pytest.mark.slow
def test_bombs_take_little_memory(tmp_path: Path) -> None:
    block = {"nul": b"\0", "blank": b" ", "letter": b"a", "brackets": b"[],"}
    bombs = []
    for name, unit in block.items():
        bombs.append(tmp_path / f"{name}.jsonl.gz")
        with gzip.open(bombs[-1], "wb", compresslevel=1) as stream:
            for _ in range(2 * MAX_LINE_BYTES // 1_200_000):
                stream.write(unit * (1_200_000 // len(unit)))
    environment = dict(os.environ) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", BOMBS, *map(str, bombs)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("line 1 has more than 128,000,000 bytes") == len(bombs)
