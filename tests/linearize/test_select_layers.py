"""Layers chosen by measurement: each rule's numbers against models built one by one, and what the
lineage then says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.tiny import save_model, tiny, tokens, write_text

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.evaluation.baselines import remix_of
from regraft.linearize import select_layers
from regraft.linearize.select_layers import SelectionData
from regraft.mixers.remix import Remix

OUT = {"gpt_neox": "dense", "gpt2": "c_proj"}
PLAIN = Remix(window=8, sinks=2, keep="none")


def windows(rows: int = 2, length: int = 60) -> Packed:
    ids = tokens(rows, length)
    ids[:, 40:50] = ids[:, 5:15]  # what can be copied from beyond the window
    return Packed(ids, torch.arange(length).expand_as(ids), torch.full((rows,), 4 * length))


@pytest.fixture(params=["llama", "gpt_neox", "gpt2", "gemma"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    tiny(request.param)[1].save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


@torch.no_grad()
def nll(model: torch.nn.Module, rows: Packed) -> torch.Tensor:
    """(rows, length - 1)."""
    logits = model(rows.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -logits.gather(2, rows.input_ids[:, 1:, None]).squeeze(2)


def test_bypass_is_the_loss_without_one_attention(source: Checkpoint) -> None:
    rows = windows()
    found = select_layers.bypass(source, PLAIN, SelectionData(rows))
    model = modeling.materialize(source)
    for layer, slot in enumerate(modeling.slots(model, source)):
        out = dict(slot.named_children())[OUT.get(source.anatomy.family, "o_proj")]
        kept = {name: value.clone() for name, value in out.state_dict().items()}
        for parameter in out.parameters():
            torch.nn.init.zeros_(parameter)
        assert found[layer].score == pytest.approx(float(nll(model, rows).mean()), rel=1e-5)
        out.load_state_dict(kept)
    assert len({one.score for one in found}) == source.layers


@torch.no_grad()
def test_restore_is_the_divergence_with_one_layer_kept(source: Checkpoint) -> None:
    rows = windows()
    teacher = (
        modeling.materialize(source)(rows.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    )
    for one in select_layers.restore(source, PLAIN, SelectionData(rows)):
        student = modeling.materialize(dataclasses.replace(PLAIN, keep=str(one.layer))(source))
        logits = student(rows.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        kl = float((teacher.exp() * (teacher - logits)).sum(-1).mean())
        assert one.score == pytest.approx(-kl, rel=1e-4)


def test_halo_tells_copying_from_the_rest(source: Checkpoint) -> None:
    rows = windows()
    found = select_layers.halo(source, PLAIN, SelectionData(rows))
    far = torch.stack([select_layers.find_repeated_pairs(row, 8) for row in rows.input_ids])
    numbers = []
    for layer in range(source.layers):
        keep = ",".join(str(other) for other in range(source.layers) if other != layer)
        loss = nll(modeling.materialize(dataclasses.replace(PLAIN, keep=keep)(source)), rows)
        numbers.append((-float(loss[far].mean()), -float(loss[~far].mean())))
        assert (found[layer].numbers["recall"], found[layer].numbers["common"]) == pytest.approx(
            numbers[-1], rel=1e-4
        )
    best = [max(column) for column in zip(*numbers, strict=True)]
    for one, (recall, common) in zip(found, numbers, strict=True):
        assert one.score == pytest.approx(
            (best[0] - recall) / (best[1] - common + 1e-6), rel=2e-2, abs=1e-3
        )
    alone = select_layers.recall(source, PLAIN, SelectionData(rows))
    assert [(one.score, one.numbers) for one in alone] == [
        (-one.numbers["recall"], one.numbers) for one in found
    ]


def test_repeated_pairs_are_found_by_looking_for_them() -> None:
    row, window = torch.randint(0, 5, (70,), generator=torch.Generator().manual_seed(3)), 6
    ids = row.tolist()
    expected = []
    for at in range(1, len(ids)):
        earlier = [at - i for i in range(1, at) if ids[i - 1 : i + 1] == ids[at - 1 : at + 1]]
        expected.append(bool(earlier) and min(earlier) > window)
    assert select_layers.find_repeated_pairs(row, window).tolist() == expected
    assert any(expected) and not all(expected)


def test_a_text_without_anything_to_copy_is_refused(source: Checkpoint) -> None:
    ids = torch.arange(3, 63).expand(1, 60)
    rows = Packed(ids, torch.arange(60).expand(1, 60), torch.tensor([60]))
    with pytest.raises(
        RegraftError, match="no token of 1 windows of 60 can be copied from beyond 8 tokens"
    ):
        select_layers.halo(source, PLAIN, SelectionData(rows))


def test_the_best_are_kept_and_the_table_goes_into_the_lineage(
    source: Checkpoint, tmp_path: Path
) -> None:
    rows = windows()
    scores = [one.score for one in select_layers.restore(source, PLAIN, SelectionData(rows))]
    made = select_layers.resolve_keep(
        source, dataclasses.replace(PLAIN, keep="restore:2"), SelectionData(rows)
    )
    assert made.keep == ",".join(
        str(layer) for layer in sorted(sorted(range(3), key=lambda i: -scores[i])[:2])
    )
    assert made.scores["flops"] > 0 and made.scores["tokens"] == rows.input_ids.numel()
    made(source).save(tmp_path / "out")
    again = remix_of(Checkpoint.open(tmp_path / "out"))
    assert again == made and [row["score"] for row in again.scores["layers"]] == pytest.approx(
        scores
    )
    assert (
        select_layers.count_layers("25%", 30) == 8
        and select_layers.count_layers("25%", 28) == 7
        and select_layers.count_layers("1%", 3) == 1
    )
    unchanged = dataclasses.replace(PLAIN, keep="every:2")
    assert select_layers.resolve_keep(source, unchanged, SelectionData(rows)) is unchanged
    for keep, why in {
        "restore": "does not say how many",
        "halo:0": "does not say",
        "bypass:9": "more layers than",
    }.items():
        with pytest.raises(RegraftError, match=why):
            select_layers.resolve_keep(
                source, dataclasses.replace(PLAIN, keep=keep), SelectionData(rows)
            )


def test_the_command_measures_and_plans_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    words = [
        "linearize",
        model,
        tmp_path / "out",
        "--keep",
        "restore:25%",
        "--data",
        text,
        "--window",
        16,
        "--json",
    ]
    as_json(capsys, *words)
    remix = remix_of(Checkpoint.open(tmp_path / "out"))
    assert (
        remix is not None and remix.scores["rule"] == "restore" and len(remix.scores["layers"]) == 4
    )
    assert len(remix.keep.split(",")) == 1
    said = refused(capsys, "plan", model, "--mixer", "supra", "--keep", "bypass:2")
    assert "'bypass:2' is measured on the weights" in said
