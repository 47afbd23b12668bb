"""The tables of operators: what they promise is what happens, and everything that lists operators
lists these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import inputs, max_relative_difference, outputs, tiny

from regraft.core.checkpoint import Checkpoint
from regraft.growth import build, depth
from regraft.growth.operators import DEPTH, NOTES, PAPERS, PRESERVES, WIDTH, Operator
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen

BOUND = 2e-5
EVERY = [*WIDTH.items(), *DEPTH.items()]


def difference(family: str, step: Any, folder: Path) -> float:
    """Worst relative difference between a tiny model and its grown form, read by the stock class."""
    config, model = tiny(family)
    model.save_pretrained(folder / "source")
    step(Checkpoint.open(folder / "source")).save(folder / "out")
    stock = type(model).from_pretrained(folder / "out", dtype=torch.float32).eval()
    before, after = outputs(model, inputs(config)), outputs(stock, inputs(config))
    return max(max_relative_difference(before[name], after[name]) for name in before)


def holds(promise: str, found: float) -> bool:
    """Whether a difference is what an operator promises; one that preserves nothing must be seen
    to.
    """
    return {"exactly": found == 0.0, "up to rounding": found < BOUND, "not": found > 100 * BOUND}[
        promise
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", WIDTH)
def test_width_operators_keep_their_promise(name: str, family: str, tmp_path: Path) -> None:
    hidden = 144 if family == "gpt2" else 72
    found = difference(family, Widen(hidden=hidden, ffn=104, how=name), tmp_path)
    assert holds(WIDTH[name].preserves, found), found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", DEPTH)
def test_depth_operators_keep_their_promise(name: str, family: str, tmp_path: Path) -> None:
    found = difference(family, Deepen(6, name), tmp_path)
    assert holds(DEPTH[name].preserves, found), found


@pytest.mark.parametrize(("step", "table"), [(Widen, WIDTH), (Deepen, DEPTH)])
def test_docstrings_list_the_operators_and_their_papers(
    step: type, table: dict[str, Operator]
) -> None:
    text = " ".join((step.__doc__ or "").split())
    assert "{" not in text and "Preserves:" in text and "Refuses:" in text
    for name, one in table.items():
        assert f"- `{name}`: {one.does}" in text
        assert all(", ".join(PAPERS[key]) in text for key in one.papers)


def test_lists_are_the_tables() -> None:
    assert build.WIDTH_OPERATORS == tuple(WIDTH) and depth.ORDERS == tuple(DEPTH)
    assert depth.EXACT == ("identity", "llama_pro") and set(build.NOISE) <= set(WIDTH)
    assert Widen.how in WIDTH and Deepen.how in DEPTH
    assert {key for _, one in EVERY for key in one.papers} == set(PAPERS)


@pytest.mark.parametrize(("name", "one"), EVERY, ids=[name for name, _ in EVERY])
def test_entries_are_whole_and_figures_have_a_source(name: str, one: Operator) -> None:
    assert one.preserves in PRESERVES and one.when.endswith(".") and not one.does.endswith(".")
    assert set(re.findall(r"\[(\w)\]", one.when)) <= set(NOTES)
    for sentence in re.split(r"(?<=\.)\s(?=[A-Z])", one.when):
        figures = re.search(r"\d+(\.\d+)? ?%|\d+(\.\d+)?B\b|\d times", sentence)
        assert not figures or re.search(r"authors|LiGO|AquilaMoE|SOLAR", sentence), sentence
