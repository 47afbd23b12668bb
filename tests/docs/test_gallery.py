"""The gallery is what its script writes, and its pictures show what the operators do."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

from regraft.core import axes
from regraft.errors import RegraftError
from regraft.growth import depth
from regraft.growth.operators import DEPTH, WIDTH

DOCS = ROOT / "docs"
TOOLS = DOCS / "tools"
REMEDY = "run python docs/tools/gallery.py"


@pytest.fixture(scope="module")
def gallery() -> Iterator[ModuleType]:
    """The script as a module, which finds its neighbours."""
    sys.path.insert(0, str(TOOLS))
    try:
        import gallery as script

        yield script
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def page(gallery: ModuleType) -> Any:
    return gallery.Page()


def test_the_page_is_what_the_operators_say(page: Any) -> None:
    assert (DOCS / "gallery.md").read_text(encoding="utf-8") == page.text, REMEDY


def test_every_operator_has_its_section_and_picture(gallery: ModuleType, page: Any) -> None:
    for name, one in [*WIDTH.items(), *DEPTH.items()]:
        section = page.text.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert (
            gallery.link_concepts(one.when) in section
            and one.papers_text in section
            and f"](gallery/{name}" in section
        )
    assert "docs/gallery.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pictures_are_there_small_and_well_formed(page: Any) -> None:
    files = {file.name: file for file in (DOCS / "gallery").iterdir()}
    assert set(files) == set(page.pictures), REMEDY
    assert all(f"](gallery/{name})" in page.text for name in files)
    for file in files.values():
        tree = ElementTree.parse(file).getroot()
        assert tree.get("width") == "450pt" and tree.find(".//{*}text") is not None
        assert file.stat().st_size < 50_000


def test_the_script_writes_the_page_anew(
    gallery: ModuleType,
    page: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gone.svg").write_text("an operator that is no more")
    monkeypatch.setattr(gallery, "Page", lambda: page)  # making it takes a while
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--out", str(tmp_path)])
    gallery.main()
    said = capsys.readouterr()
    assert f"{len(page.pictures)} pictures" in said.out and not said.err
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == page.text
    assert {file.name for file in (tmp_path / "gallery").iterdir()} == set(page.pictures)


def news(scenes: Any) -> dict[str, Any]:
    return {f"{one.name} {drawn.title}".strip(): drawn for one in scenes for drawn in one.news}


def new(drawn: Any) -> set[str]:
    """What stands where nothing old does."""
    return set(drawn.kinds.flat) - {"old"}


def test_units_are_traced(gallery: ModuleType) -> None:
    pad, zero_in, pair = (news(gallery.on_units(how)) for how in ("pad", "zero_in", "pair"))
    assert [new(pad[name]) for name in ("gate", "up", "down")] == [{"random"}, {"random"}, {"zero"}]
    assert [new(zero_in[name]) for name in ("gate", "up", "down")] == [
        {"random"},
        {"zero"},
        {"random"},
    ]
    assert new(pair["down"]) == {"random", "opposite"} and (pair["up"].kinds[4:] == "random").all()
    assert new(news(gallery.on_units("aki"))["up"]) == {"following"}


@pytest.mark.parametrize("how", ["split", "tile", "duplicate", "lemon"])
def test_shares_of_copies_sum_to_one(how: str, gallery: ModuleType) -> None:
    down = news(gallery.on_units(how))["down"]
    shares = np.zeros(5)
    np.add.at(shares, down.origins[0], down.times[0])
    assert np.allclose(shares[1:], 1, atol=1e-6) and new(down) == {"copy"}
    assert (
        down.noisy.any() == (how != "split") and not news(gallery.on_units(how))["up"].noisy.any()
    )


def test_the_stream_is_traced_under_both_norms(gallery: ModuleType) -> None:
    pad, lemon = (news(gallery.on_stream(how)) for how in ("pad", "lemon"))
    assert new(pad["RMS norm down"]) == {"zero"} and new(pad["LayerNorm down"]) == {"average"}
    assert new(pad["LayerNorm bias"]) == {"zero"} and new(pad["RMS norm up"]) == {"random"}
    assert new(lemon["LayerNorm down"]) == {"copy", "average"} and lemon["RMS norm gain"].lines(
        lemon["RMS norm gain"].times
    )[0] == pytest.approx((8 / 9) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("how", DEPTH)
def test_layers_are_traced(how: str, gallery: ModuleType) -> None:
    slots = gallery.trace_layers(how)
    order = depth.build_layer_order(how, 6, len(slots))
    assert [slot.idle for slot in slots] == [layer.new for layer in order]
    told = [layer.source for layer in order if how != "identity" or not layer.new]
    assert [slot.source for slot in slots if slot.source is not None] == told


def swapped(old: int, new: int, seed: int = 0) -> axes.Expansion:
    return axes.duplicate(old, new, seed)


def test_another_operator_gives_another_scene(
    gallery: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = news(gallery.on_units("split"))["down"]
    monkeypatch.setattr(axes, "split", swapped)
    gallery.on_units.cache_clear()
    try:
        after = news(gallery.on_units("split"))["down"]
        assert not np.array_equal(before.times, after.times)
    finally:
        gallery.on_units.cache_clear()


def test_what_has_no_word_is_refused(gallery: ModuleType) -> None:
    with pytest.raises(RegraftError, match=r"takes \[7\] of \[5, 6, 7, 8\]"):
        gallery.describe_sizes([5, 6, 7, 8], 4, lambda size: axes.tile(7, size))
    drawn = news(gallery.on_units("split"))["down"]
    with pytest.raises(RegraftError, match="mixes"):
        drawn.lines(drawn.noisy + np.indices(drawn.kinds.shape)[0])
