"""The report: self-contained, readable without scripts, the same numbers as report.json."""

from __future__ import annotations

import base64
import io
import json
import re
import time

import pytest
from helpers.html import Balanced

from regraft.errors import RegraftError
from regraft.io.files import read_json_lines
from regraft.progress import BEAT, Ticker, format_seconds
from regraft.recipes.journal import Journal
from regraft.report import html, plots, units
from regraft.train.output import open_run


def row(perplexity: float, kl: float | None) -> dict:
    return {
        "perplexity": perplexity, "perplexity_error": 0.01, "byte_perplexity": 1.8, "bits_per_byte": 0.85,
        "kl": kl, "tokens": 4092, "windows": 4,
    }  # fmt: skip


def speed(length: int) -> dict:
    keys = ("state_bytes", "converted_bytes", "kept_bytes", "peak_bytes", "load_bytes")
    return {"length": length, "decode_tok_s": 20.5, "prefill_tok_s": 411.0} | {
        key: length * 7 for key in keys
    }


@pytest.fixture
def folder(tmp_path):
    baselines = {"teacher": row(9.125, None), "converted, before training": row(12.5, 0.31)}
    files = {
        "eval": {"model": "out", **row(10.0625, 0.0815), "baselines": baselines},
        "bench": {"teacher": [speed(1024), speed(4096)], "student": [speed(1024), speed(4096)]},
        "samples": [
            {"prompt": "<script>alert(1)</script>", "teacher": "a & b", "student": "</div>"}
        ],
        "time": {"seconds": 90.0, "phases": {}},
    }
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    rows = [
        {
            "stage": stage,
            "kind": kind,
            "step": n,
            "tokens": 64 * n,
            "loss": 1 / n,
            "seconds": n / 2,
            "flops": 10**9 * n,
        }
        for stage, kind in enumerate(("align", "distil"))
        for n in range(1, 30)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + '{"stage": 1, "ki'
    )
    return tmp_path


def test_page_stands_alone_and_is_well_formed(folder):
    page = html.write(folder).read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.stack == []
    links = [
        value for _, attrs in parser.tags for key, value in attrs.items() if key in ("src", "href")
    ]
    assert len(links) == 3 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert all(b"<svg" in base64.b64decode(link.split(",")[1]) for link in links)
    assert "script" not in {tag for tag, _ in parser.tags}
    assert "&lt;script&gt;" in page and "a &amp; b" in page


def test_page_and_json_agree(folder):
    page, numbers = html.write(folder).read_text(), json.loads((folder / "report.json").read_text())
    for name, line in html.eval_rows(numbers["eval"]).items():
        assert name in page and units.format_number(line["perplexity"]) in page
    assert numbers["ledger"][-1] == {
        "stage": "total",
        "tokens": 64 * 29 * 2,
        "flops": 58 * 10**9,
        "seconds": 29.0,
    }
    assert "3,712 tokens" in page and "1.5 minutes" in page


def test_same_numbers_give_the_same_page(folder):
    assert html.write(folder).read_bytes() == html.write(folder).read_bytes()


def test_unfinished_run_still_gives_a_page(tmp_path):
    assert "<h1>" in html.write(tmp_path).read_text()


def test_damaged_files_are_named(folder):
    (folder / "eval.json").write_text("{")
    with pytest.raises(RegraftError, match="eval.json' is not JSON"):
        html.collect(folder)
    (folder / "metrics.jsonl").write_text('{"a": \n{}\n')
    with pytest.raises(RegraftError, match="metrics.jsonl' line 1"):
        read_json_lines(folder / "metrics.jsonl", dict)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (7, "7"),
        (1048576, "1,048,576"),
        (3e15, "3e+15"),
    ],
)
def test_numbers_are_shortened(value, text):
    assert units.format_number(value) == text


def test_running_mean_of_a_constant_is_the_constant():
    assert plots.smooth([2.0] * 50) == pytest.approx([2.0] * 50)


def test_no_training_no_curve():
    assert plots.plot_losses([{"eval": "model", "perplexity": 3.0}]) is None


def test_ticker_speaks_at_least_every_beat(monkeypatch):
    monkeypatch.setattr("regraft.progress.BEAT", 0.6)
    monkeypatch.setattr("regraft.progress.QUIET", 0.0)
    stream = io.StringIO()
    with Ticker(budget=100, spent=40, stream=stream) as ticker:
        ticker.start("thinking")
        ticker.update(0.5, "halfway")
        time.sleep(2.4)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and all(line.startswith("regraft: thinking") for line in lines)
    assert re.search(
        r"50% · halfway · about \d+:\d\d to go here · 0:4\d used · 0:5\d of 1:40 left", lines[-1]
    )
    assert BEAT <= 10


def test_clock():
    assert (format_seconds(75), format_seconds(-3), format_seconds(3600)) == (
        "1:15",
        "0:00",
        "60:00",
    )


def test_journal_remembers_time_and_phases(tmp_path):
    first = Journal(tmp_path / "run", "seed: 0\n", 15)
    first.ticker.start("linearize")
    first.finish("linearize")
    second = Journal(tmp_path / "run", "seed: 0\n", 15)
    assert second.is_done("linearize") and not second.is_done("train")
    assert second.ticker.budget == 900


def test_a_run_refuses_foreign_folders(tmp_path):
    with open_run(tmp_path / "run", "run", lambda: {"recipe": "a: 1\nseed: 0\n"}):
        pass
    with (
        pytest.raises(RegraftError, match="'seed: 0' there, 'seed: 1' here"),
        open_run(tmp_path / "run", "run", lambda: {"recipe": "a: 1\nseed: 1\n"}),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with (
        pytest.raises(RegraftError, match="'thesis.tex', which is not of regraft"),
        open_run(tmp_path / "other", "run", lambda: {"recipe": "seed: 0\n"}),
    ):
        pass
