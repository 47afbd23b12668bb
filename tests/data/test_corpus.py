"""Text on disk as rows of tokens: every format, any interruption, any number of processes give the
same rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from backports import zstd
from helpers import ROOT, TESTS
from helpers.cli import as_json, refused
from helpers.tiny import byte_tokenizer, save_model, write_text
from helpers.training import Letters
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regraft import distributed
from regraft.data import corpus as building
from regraft.data import documents as reading
from regraft.data import files, token_cache, tokenizer
from regraft.data.corpus import Corpus, TextMixture
from regraft.data.documents import BadLines, ReadPosition, read_pieces
from regraft.data.packing import pack, read_documents
from regraft.data.text import Text
from regraft.data.tokenizer import BatchTokenizer
from regraft.errors import RegraftError
from regraft.io.files import PART
from regraft.train.output import TEXT

TOKENIZER = byte_tokenizer()
PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Documents of 1 to 200 letters, some beyond ASCII."""
    chance = random.Random(seed)
    return [
        "".join(chance.choices("abc dé\n", k=chance.randint(1, 200))).strip() + "x"
        for _ in range(count)
    ]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def same(rows: Any, expected: Any) -> None:
    """All rows at once, and some one by one and out of order."""
    assert (
        len(rows) == len(expected)
        and rows.tokens == expected.tokens
        and rows.largest == expected.largest
    )
    for pick in (slice(None), slice(1, 3), torch.tensor([len(expected) - 1, 0]), [-1]):
        for name in ("input_ids", "position_ids", "bytes"):
            assert torch.equal(getattr(rows[pick], name), getattr(expected[pick], name))
    assert rows[:1].mask == expected[:1].mask and rows[:1].special == expected[:1].special


def contents(folder: Path) -> dict[str, bytes]:
    """Files of all caches, locks apart; the name without the hash, which differs between copies of
    a file.
    """
    return {
        f"{file.parent.name.rpartition('-')[0]}/{file.name}": file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lock"
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some documents."""
    monkeypatch.setattr(token_cache, "BLOCK", 300)


@pytest.mark.parametrize("length", [7, 64, 500])
@pytest.mark.parametrize("block", [1, 300, 1 << 20])
def test_rows_on_disk_are_those_in_memory(length, block, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK", block)
    write_text(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(jsonl([]))
    (tmp_path / "c.jsonl").write_bytes(jsonl(documents()))
    expected = pack(read_documents(tmp_path), TOKENIZER, length)
    same(TextMixture([Text(str(tmp_path))], TOKENIZER)(length), expected)
    letters = TextMixture([Text(str(tmp_path))], Letters())(length)
    assert torch.equal(
        letters[:].input_ids, pack(read_documents(tmp_path), Letters(), length).input_ids
    )


def test_shares_hold(tmp_path):
    for name, count in {"a": 60, "b": 25}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(documents(count, count)))
    texts = [Text(str(tmp_path / "a.jsonl"), 0.7), Text(str(tmp_path / "b.jsonl"), 0.3)]
    packs = [pack(read_documents(text.path), TOKENIZER, 32) for text in texts]
    scale = min(len(packed) / text.share for packed, text in zip(packs, texts, strict=True))
    picked = []
    for packed, text in zip(packs, texts, strict=True):
        picked.append(
            packed[torch.linspace(0, len(packed) - 1, int(scale * text.share)).round().long()]
        )
    rows = TextMixture(texts, TOKENIZER)(32)
    for name in ("input_ids", "position_ids", "bytes"):
        assert torch.equal(
            getattr(rows[:], name), torch.cat([getattr(packed, name) for packed in picked])
        )
    assert torch.equal(
        rows[[len(picked[0]), 0]].input_ids, torch.stack([p.input_ids[0] for p in reversed(picked)])
    )


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    """Documents in a file of a kind."""
    file = folder / f"text{kind}"
    if kind == ".arrow":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"n": range(len(texts)), "text": texts}).save_to_disk(
            folder / "saved"
        )
        next((folder / "saved").glob("*.arrow")).rename(file)
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.table({"n": range(len(texts)), "text": texts}), file, row_group_size=13
        )
    else:
        plain = "\n\n\n".join(texts).encode() if ".txt" in kind else jsonl(texts)
        file.write_bytes(PACKERS.get(file.suffix, bytes)(plain))
    return file


KINDS = (
    ".txt",
    ".txt.gz",
    ".txt.xz",
    ".txt.zst",
    ".json",
    ".jsonl.gz",
    ".jsonl.xz",
    ".jsonl.zst",
    ".parquet",
    ".arrow",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_interrupted_after_any_block(kind, tmp_path, monkeypatch, small):
    """The same rows as .jsonl, the same bytes in the cache wherever the build was cut, torn files
    included.
    """
    texts = [re.sub("\n+", "\n", text).strip() for text in documents()]
    expected = TextMixture([Text(str(write(tmp_path, ".jsonl", texts)))], TOKENIZER)(50)
    text = Text(str(write(tmp_path, kind, texts)))
    same(TextMixture([text], TOKENIZER, cache=tmp_path / "whole")(50), expected)
    whole, original, cuts = contents(tmp_path / "whole"), token_cache.TokenCache._write_journal, 0

    def cut(self: Any, known: Any, place: Any, bad: Any, *streams: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt  # tokens are written, the journal does not know of them
        left -= 1
        original(self, known, place, bad, *streams)

    monkeypatch.setattr(token_cache.TokenCache, "_write_journal", cut)
    for blocks in range(0, 30, 3):
        left, place = blocks, tmp_path / f"cut{blocks}"
        try:
            TextMixture([text], TOKENIZER, cache=place)(50)
        except KeyboardInterrupt:
            cuts += 1
            for name in ("tokens", "documents"):
                with next(place.rglob(name)).open("ab") as stream:
                    stream.write(b"torn")
            left = 1
            with contextlib.suppress(KeyboardInterrupt):  # and cut once more
                TextMixture([text], TOKENIZER, cache=place)(50)
            left = -1
            TextMixture([text], TOKENIZER, cache=place)(50)
        assert contents(place) == whole
    assert 3 < cuts < 10


@pytest.mark.slow
def test_killed_builds_go_on(tmp_path, small):
    file = write(tmp_path, ".jsonl.xz", documents(9000))
    TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "whole")(50)
    whole, chance, kills, last = contents(tmp_path / "whole"), random.Random(0), 0, -1
    while not contents(tmp_path / "killed") == whole:
        process = os.fork()
        if not process:
            TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "killed")(50)
            os._exit(0)
        time.sleep(chance.uniform(0.1, 0.6))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
        journals = list((tmp_path / "killed").rglob("journal.json"))
        now = json.loads(journals[0].read_text())["tokens"] if journals else -1
        assert now >= last and kills < 200
        last = now
    assert kills > 2


def test_what_a_kill_leaves_beside_a_journal_goes(tmp_path, small):
    file = write(tmp_path, ".jsonl", documents())
    TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "whole")(50)
    TextMixture([Text(str(file), max_tokens=50)], TOKENIZER, cache=tmp_path / "cut")(50)
    folder = next((tmp_path / "cut").rglob("journal.json")).parent
    (folder / f"{PART}1-journal.json").write_text("{")
    TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cut")(50)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_cache_is_read_once(tmp_path, monkeypatch, small):
    file = write(tmp_path, ".jsonl", documents())
    TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cache")(50)
    monkeypatch.setattr(token_cache, "read_pieces", None)
    again = TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cache")
    same(again(20), pack(read_documents(file), TOKENIZER, 20))
    monkeypatch.undo()
    file.write_bytes(jsonl(documents(30)))  # another text under the same name, another tokenizer
    same(
        TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cache")(20),
        pack(documents(30), TOKENIZER, 20),
    )
    TextMixture([Text(str(file))], Letters(), cache=tmp_path / "cache")(20)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_makes_the_same_cache(world, tmp_path, monkeypatch, small):
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(documents(40, number)))
    text = Text(str(tmp_path / "*.jsonl"))
    expected = TextMixture([text], TOKENIZER, cache=tmp_path / "one")(50)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    begun = []
    original = token_cache.TokenCache.fill

    def noted(part: Any, *rest: Any) -> bool:
        begun.append(part.file.name)
        return original(part, *rest)

    monkeypatch.setattr(token_cache.TokenCache, "fill", noted)
    for rank in range(
        world
    ):  # each begins with a file of its own; the first to come finishes what is left
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        corpus = Corpus(text, TOKENIZER, tmp_path / "many")
        part, enough = corpus.find_unread_files(None)[rank]
        assert part.fill(enough, False)
    assert begun == [
        f"{number}.jsonl" for number in ([0] if world == 1 else [0, 2] if world == 2 else [0, 2, 4])
    ]
    same(TextMixture([text], TOKENIZER, cache=tmp_path / "many")(50), expected[:])
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert len(begun) == len(set(begun)) == 5


def test_a_file_that_another_process_reads_is_left_to_it(tmp_path, monkeypatch, small):
    file = write(tmp_path, ".jsonl", documents())
    corpus = Corpus(Text(str(file)), TOKENIZER, tmp_path / "cache")
    part = corpus.parts[0]
    part.folder.mkdir(parents=True)
    lock = token_cache.FileLock(part.folder / "lock")
    lock.acquire()
    assert not part.fill(None, False)
    monkeypatch.setattr(building.time, "sleep", lambda seconds: lock.release())
    assert len(corpus.rows(50)) == len(pack(documents(), TOKENIZER, 50))


@pytest.mark.parametrize("enough", [None, 1 << 20])
def test_a_file_that_another_process_has_just_read_is_not_read_again(
    enough: int | None, tmp_path: Path, small: None
) -> None:
    """Both found it unread, and the second got the lock when the first was done."""
    file = write(tmp_path, ".jsonl", documents())
    first, second = (Corpus(Text(str(file)), TOKENIZER, tmp_path / "cache") for _ in range(2))
    [(early, _)], [(late, _)] = (corpus.find_unread_files(enough) for corpus in (first, second))
    assert early.fill(enough, False)
    before = contents(tmp_path / "cache")
    assert late.fill(enough, False)
    assert contents(tmp_path / "cache") == before
    assert late.journal.tokens == early.journal.tokens


BAD = [
    (
        "a.jsonl",
        b'{"text": "one"}\n{"text": "x"\n{"text": "two"}\n',
        "a.jsonl' line 2 is not JSON",
        2,
    ),
    (
        "b.jsonl",
        b'{"text": "one"}\n{"txt": 3}\n[1]\n{"text": null}\n',
        "b.jsonl' line 2 has no string field 'text'",
        1,
    ),
    ("c.jsonl", b'{"text": "one"}\n\n"\xe9"\n{"text": "2"}', "c.jsonl' line 3 is not UTF-8", 2),
    (
        "d.jsonl",
        b'{"text": "one"}\n{"text": "\\ud800"}\n',
        "d.jsonl' line 2 holds half a character",
        1,
    ),
    ("e.jsonl", b'{"text": "one"}\n' + b"[" * 100000, "e.jsonl' line 2 is not JSON", 1),
    ("f.txt", b"one\n\n\ntwo\xe9\nthree\n", r"f.txt' line 4 is not UTF-8 \(byte 9\)", 2),
    ("g.txt", b"one\n\n\ntwo\xc3", r"g.txt' line 4 is not UTF-8 \(byte 9\)", 1),
    (
        "h.jsonl.gz",
        gzip.compress(jsonl(documents(99)))[:-900],
        "h.jsonl.gz' cannot be read beyond line",
        None,
    ),
    (
        "i.jsonl.xz",
        lzma.compress(jsonl(documents(99)))[:-900],
        "i.jsonl.xz' cannot be read beyond line",
        None,
    ),
    (
        "j.jsonl.zst",
        zstd.compress(jsonl(documents(99)))[:-9],
        "j.jsonl.zst' cannot be read beyond line",
        None,
    ),
    ("k.txt.gz", b"no gzip", "k.txt.gz' cannot be read beyond line 0", 0),
    ("l.txt.zst", b"no zstd", "l.txt.zst' cannot be read beyond line 0", 0),
    ("m.parquet", b"PAR1 broken", "m.parquet' is no readable parquet file", 0),
    ("n.arrow", b"broken", "n.arrow' is no readable arrow file", 0),
]


@pytest.mark.parametrize(("name", "content", "says", "good"), BAD, ids=[case[0] for case in BAD])
def test_bad_lines_are_named_or_counted(name, content, says, good, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(jsonl(["good"]))
    with pytest.raises(RegraftError, match=says):
        read_documents(file)
    where = str(tmp_path)
    with pytest.raises(RegraftError, match=f"{says}.*--skip-bad"):
        TextMixture([Text(where)], TOKENIZER, cache=tmp_path / "cache")(2)
    skipping = TextMixture([Text(where, skip_bad=True)], TOKENIZER, cache=tmp_path / "cache")
    skipping(2)
    facts = skipping.facts()[0]
    bad = 3 if name == "b.jsonl" else 1
    assert facts["bad_lines"] == bad and re.search(says, facts["bad"][0]) and facts["complete"]
    assert facts["documents"] == good + 1 if good is not None else 0 < facts["documents"] < 100
    assert re.search(f"left out {bad} bad lines: .*{says}", capsys.readouterr().err)
    with pytest.raises(
        RegraftError, match=says
    ):  # the cache is there, and still the text is not good
        TextMixture([Text(where)], TOKENIZER, cache=tmp_path / "cache")(2)


def test_bad_lines_are_counted_once_over_interruptions(tmp_path, monkeypatch, small):
    lines = [line if n % 7 else b"{" for n, line in enumerate(jsonl(documents()).splitlines())]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    text = Text(str(tmp_path / "a.jsonl"), skip_bad=True)
    for tokens in (1, 1000, 2000, 3000):
        Corpus(text, TOKENIZER, tmp_path / "cache").fill_caches(tokens)
    rows = TextMixture([text], TOKENIZER, cache=tmp_path / "cache")
    rows(10)
    assert rows.facts()[0]["bad_lines"] == 9 and rows.facts()[0]["bad"][1].startswith(
        f"'{tmp_path}/a.jsonl' line 8 "
    )


def test_a_damaged_parquet_group_is_named(tmp_path):
    file = write(tmp_path, ".parquet", documents())
    content = bytearray(file.read_bytes())
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        column = table.metadata.row_group(2).column(1)
    content[column.dictionary_page_offset : column.dictionary_page_offset + 12] = b"\xff" * 12
    file.write_bytes(content)
    with pytest.raises(RegraftError, match="text.parquet' rows 27 to 39 cannot be read"):
        TextMixture([Text(str(file))], TOKENIZER)(10)
    rows = TextMixture([Text(str(file), skip_bad=True)], TOKENIZER)
    rows(10)
    assert rows.facts()[0]["documents"] == 60 - 13
    with pytest.raises(RegraftError, match=r"no column 'story': choose --field of \['n', 'text'\]"):
        TextMixture([Text(str(file), field="story")], TOKENIZER)(10)


def test_paths(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", "notes.md", "settings.json"):
        (tmp_path / name).write_bytes(PACKERS.get(Path(name).suffix, bytes)(jsonl([name])))
    (tmp_path / "odd,name.txt").write_text("odd")

    def named(path: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in files.find_files(path)]

    assert named(str(tmp_path)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz", "odd,name.txt"]
    assert named(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert named(f"{tmp_path}/**/*.jsonl*") == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]
    assert named(f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl") == ["b.jsonl", "a.jsonl"]
    assert named(f"{tmp_path}/odd,name.txt") == ["odd,name.txt"]
    assert named(f"{tmp_path}/settings.json") == ["settings.json"]
    refusals = {
        "*.txt.gz": "no text at",
        "notes.md": "its name must end in",
        "gone.txt": "no text at",
    }
    for path, says in refusals.items():
        with pytest.raises(RegraftError, match=says):
            files.find_files(tmp_path / path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text(" \n\n\n\n")
    for path in ("empty", "empty.txt"):
        with pytest.raises(RegraftError, match="no text in"):
            TextMixture([Text(str(tmp_path / path))], TOKENIZER)(10)
    with pytest.raises(RegraftError, match="4 tokens, less than one row of 10"):
        TextMixture([Text(str(tmp_path / "odd,name.txt"))], TOKENIZER)(10)
    with pytest.raises(RegraftError, match="max_tokens is -1"):
        TextMixture([Text(str(tmp_path), max_tokens=-1)], TOKENIZER)


def test_packages_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    for kind, module in {".jsonl.zst": "backports", ".parquet": "pyarrow"}.items():
        file = write(tmp_path, kind, ["x"])
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            patched.delitem(sys.modules, f"{module}.zstd", raising=False)
            with pytest.raises(RegraftError, match=r"pip install 'regraft\[data\]'"):
                read_documents(file)


@pytest.mark.parametrize("length", [5, 33, 150])
def test_long_documents_are_cut_by_choice(length, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(documents(30, number)))
    expected, row, dropped = [], [], 0
    for text in read_documents(tmp_path):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"] + [2]
        fits = length - len(row)
        row += list(enumerate(ids))[:fits]
        if len(row) == length:
            dropped += len(ids[fits:])
            expected.append(row)
            row = []
    rows = TextMixture([Text(str(tmp_path), overflow="cut")], TOKENIZER)
    found = rows(length)[:]
    assert found.input_ids.tolist() == [[token for _, token in row] for row in expected]
    assert found.position_ids.tolist() == [[position for position, _ in row] for row in expected]
    assert rows.facts()[0]["cut_off_tokens"] == dropped > 0


@pytest.mark.parametrize("long", ["carry", "cut"])
def test_no_more_is_read_than_is_needed(long, tmp_path, monkeypatch, small):
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(documents(40, number)))
    whole = TextMixture([Text(str(tmp_path), overflow=long, max_tokens=0)], TOKENIZER)(32)[:]
    text = Text(str(tmp_path), overflow=long, max_tokens=6400)
    for before in (None, 0, 2000, 30_000):  # whatever an earlier run left in the cache
        place = tmp_path / f"cache{before}"
        if before is not None:
            TextMixture([Text(str(tmp_path), max_tokens=before)], TOKENIZER, cache=place)(32)
        rows = TextMixture([text], TOKENIZER, cache=place)
        assert len(rows(32)) == 200 and torch.equal(rows(32)[:].input_ids, whole.input_ids[:200])
        facts = rows.facts()[0]
        assert (
            facts["row_tokens"] == 6400
            and facts["files"] == 9
            and facts["file_bytes"] > facts["text_bytes"] > 0
        )
        assert not facts["complete"] or before == 0
        if before is None:
            assert facts["files_read"] < 6 and facts["tokens"] < 30_000
    monkeypatch.setattr(building, "MIN_READ_TOKENS", 100)
    assert len(TextMixture([Text(str(tmp_path), overflow=long)], TOKENIZER, need=640)(32)) == 20


def old(text: str) -> list[str]:
    """How .txt was read when it was read whole."""
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n[ \t]*\n\s*", text) if part.strip()]


@settings(max_examples=150, deadline=None)
@example(text="\r   \r\ra", chunk=1, line=5, stop=0)
@given(
    text=st.text("ab \n\t\r\u2028é\x0b", max_size=60),
    chunk=st.integers(1, 9),
    line=st.integers(5, 20),
    stop=st.integers(0, 5),
)
def test_text_is_split_alike_whatever_the_chunks(text, chunk, line, stop, tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "CHUNK", chunk)
        patched.setattr(reading, "CHUNK", line)
        whole = list(read_pieces(file, "text", ReadPosition(), BadLines()))
        assert (
            [piece.text for piece in whole]
            == old(file.read_text(encoding="utf-8"))
            == read_documents_or_none(file)
        )
        for piece in whole[stop : stop + 1]:  # and from the middle
            place = ReadPosition(**json.loads(json.dumps(piece.after.json())))
            rest = [later.text for later in read_pieces(file, "text", place, BadLines())]
            assert rest == [later.text for later in whole[stop + 1 :]]


def read_documents_or_none(file: Path) -> list[str]:
    try:
        return read_documents(file)
    except RegraftError:
        return []


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab \n\té", max_size=200),
    chunk=st.integers(5, 40),
    kind=st.sampled_from([".txt", ".jsonl"]),
)
def test_long_documents_come_in_pieces(text, chunk, kind, tmp_path_factory):
    """Together they are the document; a stop between two of them loses nothing, and chunks do not
    matter.
    """
    file = tmp_path_factory.mktemp("split") / f"a{kind}"
    file.write_bytes(jsonl([text]) if kind == ".jsonl" else text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "PIECE", 16)
        patched.setattr(reading, "NEAR", 8)
        parts = list(read_pieces(file, "text", ReadPosition(), BadLines()))
        patched.setattr(files, "CHUNK", chunk)
        again = list(read_pieces(file, "text", ReadPosition(), BadLines()))
        patched.setattr(reading, "CHUNK", chunk)
        small = list(read_pieces(file, "text", ReadPosition(), BadLines()))
        assert [(p.text, p.ends) for p in parts] == [(p.text, p.ends) for p in again]
        assert [(p.text, p.ends) for p in parts] == [(p.text, p.ends) for p in small]
        joined = "".join(piece.text + "\0" * piece.ends for piece in parts).split("\0")[:-1]
        assert joined == (
            old(text) if kind == ".txt" else [text.strip("\n")] if text.strip() else []
        )
        assert all(len(piece.text.rstrip()) <= 16 for piece in parts)
        for number, piece in enumerate(small):
            if piece.after is not None:
                rest = [
                    p.text
                    for p in read_pieces(
                        file, "text", ReadPosition(**piece.after.json()), BadLines()
                    )
                ]
                assert rest == [p.text for p in small[number + 1 :]]


class Counting:
    """A tokenizer that costs nothing: one token a text."""

    eos_token_id = 2

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + len(text) % 90] for text in texts]}


@pytest.mark.parametrize("kind", [".txt", ".jsonl.gz", ".parquet"])
def test_memory_does_not_grow_with_the_file(kind, tmp_path, monkeypatch):
    for module in (files, reading):
        monkeypatch.setattr(module, "CHUNK", 1 << 16)
    monkeypatch.setattr(reading, "PIECE", 1 << 16)
    monkeypatch.setattr(token_cache, "BLOCK", 1 << 16)
    peaks = []
    for megabytes in (1, 8):
        texts = ["word " * 200] * (megabytes * 1000)
        if kind == ".txt":  # one document that never ends
            texts = ["word " * 200 * len(texts)]
        file = write(tmp_path, kind, texts)
        del texts
        tracemalloc.start()
        Corpus(Text(str(file)), Counting(), tmp_path / f"cache{megabytes}").fill_caches(None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000 and peaks[1] < 3_000_000


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    file = write(tmp_path, ".jsonl", documents())
    monkeypatch.setattr(
        token_cache.os,
        "fsync",
        lambda stream: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(RegraftError, match="No space left on device.*--cache"):
        TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cache")(50)
    monkeypatch.undo()
    same(
        TextMixture([Text(str(file))], TOKENIZER, cache=tmp_path / "cache")(50),
        pack(documents(), TOKENIZER, 50),
    )


def model_and_text(folder: Path) -> list[str]:
    """A command that trains a tiny model on bad text in two files."""
    save_model(folder / "model", "qwen2", 2)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(documents()) + b"{\n"))
    (folder / "b.jsonl").write_bytes(jsonl(documents(seed=1)))
    flags = {"stage": "next", "tokens": 640, "length": 32, "batch": 2, "data": f"{folder}/*.jsonl*"}
    return [
        "train",
        folder / "model",
        *(word for flag, value in flags.items() for word in (f"--{flag}", value)),
    ]


def test_train_goes_on_after_a_bad_line_and_tells_of_it(tmp_path, capsys):
    verb, model, *flags = model_and_text(tmp_path)
    command = [verb, model, tmp_path / "out", *flags]
    assert "a.jsonl.gz' line 61 is not JSON" in refused(capsys, *command)
    text = as_json(capsys, *command, "--skip-bad")["text"][0]
    assert text["bad_lines"] == 1 and "line 61" in text["bad"][0] and text["documents"] == 120
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["steps"][-1]["ledger"]["text"][0] == text
    assert not (tmp_path / "out" / TEXT).exists()
    kept = ["--cache", tmp_path / "cache", "--overflow", "cut", "--max-tokens", 320, "--skip-bad"]
    text = as_json(capsys, verb, model, tmp_path / "cut", *flags, *kept)["text"][0]
    assert text["rows"] == 10 and text["cut_off_tokens"] > 0 and not text["complete"]
    assert contents(next((tmp_path / "cache").iterdir()))


BOTH = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.tiny import byte_tokenizer, save_model, write_text
from regraft import distributed
from regraft.data import token_cache
from regraft.data.corpus import TextMixture
from regraft.data.text import Text
fill = token_cache.TokenCache.fill
def noted(part, *rest):
    if filled := fill(part, *rest):
        # at once: two processes share the output
        sys.stdout.write(f"took {{part.file.name}} {{distributed.rank()}}\\n")
        sys.stdout.flush()
    time.sleep(0.2)  # so that the other one comes to its turn
    return filled
token_cache.TokenCache.fill = noted
with distributed.init_distributed():
    distributed.barrier()
    rows = TextMixture([Text({data!r})], byte_tokenizer(), cache=Path({out!r}))(50)
    assert distributed.world_size() == 2 and len(set(distributed.all_gather(len(rows)))) == 1
    assert len({{str(part) for part in distributed.all_gather(rows[:].input_ids.sum())}}) == 1
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_two_processes_take_different_files(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(documents(40, number)))
    script = tmp_path / "both.py"
    names = {
        "tests": str(TESTS),
        "data": f"{tmp_path}/*.jsonl",
        "out": str(tmp_path / "two"),
    }
    script.write_text(BOTH.format(**names))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    took = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("took"))
    assert done.stdout.count("took") == len(took) == 6 and set(took.values()) == {"0", "1"}
    TextMixture([Text(names["data"])], TOKENIZER, cache=tmp_path / "one")(50)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("long", ["carry", "cut"])
def test_a_run_keeps_the_text_it_began_with(long, tmp_path, monkeypatch, small):
    """Also when other runs have filled the cache further, and when some of the text that it does
    not read is new.
    """
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(documents(40, number)))
    text, own, kept = (
        Text(str(tmp_path / "*.jsonl"), overflow=long, max_tokens=6400),
        tmp_path / "own",
        tmp_path / "cache",
    )
    first = TextMixture([text], TOKENIZER, own=own, cache=kept)(32)[:]
    TextMixture([Text(text.path)], TOKENIZER, cache=kept)(32)
    (tmp_path / "8.jsonl").write_bytes(jsonl(["other"]))
    assert torch.equal(
        TextMixture([text], TOKENIZER, own=own, cache=kept)(32)[:].input_ids, first.input_ids
    )
    with pytest.raises(RegraftError, match="not the one that this run began with"):
        TextMixture([dataclasses.replace(text, max_tokens=3200)], TOKENIZER, own=own, cache=kept)(
            32
        )
    (tmp_path / "0.jsonl").write_bytes(jsonl(documents(40, 99)))
    with pytest.raises(
        RegraftError, match=r"tokens of '0.jsonl' were \w{12}, those of '0.jsonl' are \w{12}"
    ):
        TextMixture([text], TOKENIZER, own=own, cache=kept)(32)


def test_a_tokenizer_has_the_name_of_what_it_does():
    one, other = byte_tokenizer(), byte_tokenizer()
    name = BatchTokenizer(one).name
    other.backend_tokenizer.enable_truncation(5)
    assert BatchTokenizer(other).name == name != BatchTokenizer(Letters()).name
    assert (
        BatchTokenizer(other)(["a long text"]) == BatchTokenizer(one)(["a long text"])
        and len(BatchTokenizer(other)(["a long text"])[0]) == 11
    )
    other.add_tokens(["long"])
    assert BatchTokenizer(other).name != name
    other.eos_token = "<bos>"
    assert BatchTokenizer(other).end == [1] and BatchTokenizer(one).end == [2]


@pytest.mark.parametrize("tail", [0, 3])
def test_a_limit_inside_a_long_document_ends_the_reading(tail, tmp_path, monkeypatch):
    """A document of several blocks, of which reading cannot go on from the middle, is read whole."""
    monkeypatch.setattr(token_cache, "BLOCK", 64)
    monkeypatch.setattr(reading, "PIECE", 16)
    monkeypatch.setattr(reading, "NEAR", 8)
    (tmp_path / "long.jsonl").write_bytes(jsonl(["word " * 200, *["short one"] * tail]))
    cache = token_cache.TokenCache(
        tmp_path / "cache", tmp_path / "long.jsonl", "text", tokenizer.BatchTokenizer(TOKENIZER)
    )
    for _ in range(3):  # each call resumes from the journal; none may read the same again for ever
        assert cache.fill(100, False)
    assert cache.read_journal().tokens >= 1000


@pytest.mark.parametrize("overflow", ["carry", "cut"])
def test_documents_begin_with_bos_in_the_place_of_their_first_token(
    overflow: Any, tmp_path: Path
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_bytes(jsonl(documents()))
    text = Text(str(file), overflow=overflow)
    plain, begun = (
        Corpus(dataclasses.replace(text, bos=bos), TOKENIZER, tmp_path / "cache").rows(24)
        for bos in (False, True)
    )
    before, after = plain[:], begun[:]
    first = before.position_ids == 0
    assert (after.input_ids[first] == TOKENIZER.bos_token_id).all() and first[:, 0].all()
    assert torch.equal(after.input_ids[~first], before.input_ids[~first])
    assert torch.equal(after.position_ids, before.position_ids) and plain.digest != begun.digest


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_bytes(jsonl(documents()))
    nameless = byte_tokenizer()
    nameless.bos_token = None
    with pytest.raises(RegraftError, match="has none: set bos_token in"):
        Corpus(Text(str(file), bos=True), nameless, tmp_path / "cache").rows(24)
