"""What counts as equal between llama.cpp and a class of transformers, with a pretended engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import tiny, tokens
from torch import Tensor

from regraft.errors import RegraftError
from regraft.export.gguf import engine


@torch.no_grad()
def compare(
    monkeypatch: pytest.MonkeyPatch, off: float, own: float | None = None
) -> engine.EngineEquality:
    """llama.cpp differs by `off` of the largest logit, the class from itself by `own`."""
    stock, ids = tiny("llama", layers=2)[1].float().eval(), tokens(1, 12, 60)
    logits = stock(ids, use_cache=False).logits[0]
    one = torch.zeros_like(logits)
    one[3, 5] = logits.abs().max()
    one[3, 5] *= -logits[3, 5].sign()  # away from being the best token

    def read(*_: Any) -> Tensor:
        return logits + off * one

    monkeypatch.setattr(engine, "open_engine", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(engine, "read_logits", read)
    if own is not None:
        monkeypatch.setattr(engine, "step_logits", lambda *_: logits + own * one)
    return engine.compare_engine(Path("no.gguf"), stock, ids, engine.BOUND)


def test_a_difference_within_the_bound_needs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(monkeypatch, 5e-5)["own_difference"] is None


def test_more_than_the_class_differs_from_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RegraftError, match=r"differ on 12 tokens: logits by 5\.0e-04"):
        compare(monkeypatch, 5e-4)
    with pytest.raises(RegraftError, match=r"logits by 1\.0e-03"):
        compare(monkeypatch, 1e-3, own=4e-4)


def test_rounding_of_the_class_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(monkeypatch, 5e-4, own=4e-4)
    assert found["own_difference"] == pytest.approx(4e-4, rel=1e-2)


@torch.no_grad()
def test_single_tokens_are_the_row_for_a_well_behaved_class() -> None:
    stock, ids = tiny("llama", layers=2)[1].float().eval(), tokens(1, 12, 60)
    torch.testing.assert_close(
        engine.step_logits(stock, ids), stock(ids, use_cache=False).logits[0], rtol=0, atol=1e-5
    )
