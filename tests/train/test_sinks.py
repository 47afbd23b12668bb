"""The closed-form start of windows with a learned sink."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.mixers import relative
from helpers.tiny import tiny, tokens
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers import registry
from regraft.mixers.attention import Attention
from regraft.mixers.base import MixerContext
from regraft.mixers.remix import Remix
from regraft.mixers.sink_window import SHUT
from regraft.train.calibrate import calibrate
from regraft.train.hooks import LayerRecord
from regraft.train.sinks import begin_rows, find_starts, fit_sinks

WINDOW = 6


def batch(rows: torch.Tensor, segments: torch.Tensor | None = None) -> tuple:
    return rows, torch.arange(rows.shape[1]).expand_as(rows), segments


@torch.no_grad()
def test_a_first_token_that_every_query_scores_alike_is_kept_exactly() -> None:
    """With keys of zero: the window and the first token, as `window` with one sink token sees
    them, is then a window with a sink of zero.
    """
    torch.manual_seed(0)
    attention = Attention(24, kv=2, group=2, dim=6, scale=0.4, qkv_bias=True, rotary=False)
    teacher = registry.build({"name": "window", "window": WINDOW, "sinks": 1}, attention)
    student = registry.build({"name": "sink_window", "window": WINDOW}, attention)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.5)
    teacher.k_proj.bias.zero_()
    for parameter in student.parameters():
        parameter.zero_()
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.sinks.fill_(SHUT)

    x = torch.randn(2, 50, 24)
    x[:, 0] = 0
    start = torch.zeros(2, 50, dtype=torch.long)
    found = fit_sinks(student, [LayerRecord(x, x, None)], [start], None)
    assert found["sink_error"] < 1e-6 and student.sinks.abs().max() < 1e-4
    whole, _ = teacher(x, MixerContext())
    again, _ = student(x, MixerContext())
    assert relative(again[:, WINDOW:], whole[:, WINDOW:]) < 1e-5
    # The first token counts twice while the window holds it too.
    assert relative(again[:, :WINDOW], whole[:, :WINDOW]) > 1e-3


def test_documents_that_begin_with_another_token_do_not_count() -> None:
    rows = torch.tensor([[5, 6, 7, 5, 8, 6, 9]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    assert find_starts(batch(rows, segments)).tolist() == [[0, 0, 0, 3, 3, -1, -1]]
    assert find_starts(batch(rows)).tolist() == [[0] * 7]


def test_texts_begin_with_the_configs_token_or_alike() -> None:
    rows = tokens(3, 9)
    given = begin_rows([batch(rows)], SimpleNamespace(bos_token_id=1))[0][0]
    assert (given[:, 0] == 1).all() and (given[:, 1:] == rows[:, 1:]).all()
    with pytest.raises(RegraftError, match="no bos_token_id, and the texts begin with 3"):
        begin_rows([batch(rows)], SimpleNamespace(bos_token_id=None))
    rows[:, 0] = 4
    assert begin_rows([batch(rows)], SimpleNamespace(bos_token_id=None))[0][0] is rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("sinks")
    tiny("ministral", sliding_window=8)[1].save_pretrained(path)
    return Checkpoint.open(path)


def run(source: Checkpoint, window: int, length: int) -> tuple:
    remix = Remix("sink_window", "none", window=window)
    model, teacher = modeling.materialize(remix(source)), modeling.materialize(source)
    batches = [batch(tokens(2, length))]
    rows = list(calibrate(model.slots(), teacher, modeling.slots(teacher, source), batches))
    return model, rows


def test_layers_that_see_no_further_than_the_window_stay_as_they_are(source: Checkpoint) -> None:
    model, rows = run(source, 8, 40)  # layers 0 and 2 slide, layer 1 sees all
    assert [bool(row.get("sink_share")) for row in rows] == [False, True, False]
    for layer, slot in enumerate(model.slots()):
        shut = bool((slot.mixer.sinks == SHUT).all()) and not slot.mixer.o_proj.bias.any()
        assert shut == (layer != 1)


def test_rows_within_the_window_are_refused(source: Checkpoint) -> None:
    with pytest.raises(RegraftError, match="rows of 9 tokens have no text beyond a window of 9"):
        run(source, 9, 9)
