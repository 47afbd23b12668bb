"""A teacher behind a cache: the losses of one that runs, no second forward, a size that holds,
damage that heals.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.tiny import tiny, tokens
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.io.files import PART
from regraft.mixers.remix import Remix
from regraft.train import loop, row_store, step, teacher_cache
from regraft.train.distill import evaluate_kl
from regraft.train.hooks import run_decoder
from regraft.train.kl import head_kl, top_k_kl, top_k_log_probs
from regraft.train.row_store import RowStore
from regraft.train.stage import Stage
from regraft.train.teacher_cache import CachedTeacher, TeacherCacheConfig

REMIX = Remix("gated_deltanet", "0", window=8)
STAGE = Stage("distil", 8 * 64, length=32, batch=2, precision="float32", lr_body=1e-4)


@pytest.fixture(scope="module", params=["llama", "phi", "gpt2"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    tiny(request.param)[1].save_pretrained(folder)
    return Checkpoint.open(folder)


def rows(count: int = 8, length: int = 32) -> Packed:
    ids = tokens(count, length)
    places = torch.cat((torch.arange(length // 3), torch.arange(length - length // 3)))
    return Packed(ids, places.expand_as(ids), torch.full((count,), length))


def trained(
    source: Checkpoint, teacher: Any, stage: Stage, out: Path, **options: Any
) -> tuple[list[float], Any]:
    """(the losses, the ledger)."""
    model = modeling.materialize(REMIX(source))
    slots = modeling.slots(teacher, source) if not isinstance(teacher, CachedTeacher) else []
    ledger = loop.train(
        loop.Run(model, [stage], lambda length: rows(), out, teacher, slots, **options)
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] if "loss" in row else row["eval_kl"] for row in lines], ledger


def loads(counts: list[str]) -> Any:
    """A loader that counts."""

    def load(name: str) -> Any:
        counts.append(name)
        return modeling.load(name)

    return load


@pytest.mark.parametrize("kind", ["distil", "align"])
def test_cached_losses_are_those_of_the_teacher_and_it_runs_once(kind, source, tmp_path) -> None:
    stage, name = dataclasses.replace(STAGE, kind=kind), str(source.origin)
    options = {"heldout": rows(3), "every": 2}
    plain, spent = trained(source, modeling.load(name), stage, tmp_path / "plain", **options)
    for turn in ("first", "second"):
        counts: list[str] = []
        lessons = CachedTeacher(name, TeacherCacheConfig(tmp_path / "cache", 10**8), loads(counts))
        losses, ledger = trained(source, lessons, stage, tmp_path / turn, **options)
        told = lessons.flush()
        assert losses == pytest.approx(plain, rel=1e-6, abs=1e-7) and len(losses) == 8 + 5
        assert told["refused"] == told["damaged"] == 0
        if turn == "first":
            assert (
                counts == [name]
                and told["computed"] == told["kept"]
                and ledger["flops"] <= spent["flops"]
            )
            first, cold = ledger["flops"], losses
        else:
            # Bit for bit: a run that was stopped finds more in the cache when it goes on.
            assert losses == cold
            # also what was measured on held-out rows
            assert not counts and told["computed"] == told["kept"] == 0 and told["read"] >= 16
            assert ledger["flops"] < min(first, 0.95 * spent["flops"])


def test_later_passes_run_no_teacher_and_cost_less(source, tmp_path) -> None:
    stage = dataclasses.replace(STAGE, tokens=3 * 8 * 32)
    lessons = CachedTeacher(str(source.origin), TeacherCacheConfig(tmp_path / "cache", 10**8))
    _, ledger = trained(source, lessons, stage, tmp_path / "cached")
    _, plain = trained(source, modeling.load(source.origin), stage, tmp_path / "plain")
    assert lessons.computed == 8 and lessons.read == 16
    model = modeling.load(source.origin)
    with step.build_flop_counter() as counter, torch.no_grad():
        run_decoder(model, rows().input_ids, rows().position_ids)
    assert plain["flops"] - ledger["flops"] == pytest.approx(
        2 * counter.get_total_flops(), rel=1e-3
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [5, 40])
def test_top_kl_is_the_kl_of_its_outcomes_with_gradients(count: int, bias: bool) -> None:
    torch.manual_seed(0)
    h, t = torch.randn(2, 300, 6, requires_grad=True), torch.randn(2, 300, 6)
    head, teacher_head = nn.Linear(6, 40, bias=bias), nn.Linear(6, 40, bias=bias)
    names, logs = top_k_log_probs(t.flatten(0, 1), teacher_head, count)
    assert torch.allclose(logs.exp().sum(-1), torch.ones(600))
    names, logs = names.long().view(2, 300, -1), logs.view(2, 300, -1)
    student, target = head(h).log_softmax(-1), teacher_head(t).log_softmax(-1).detach()
    others = torch.ones_like(student).scatter(-1, names, 0.0).bool()
    parts = [(target.gather(-1, names), student.gather(-1, names))]
    if count < 40:
        parts.append(
            tuple(
                x.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
                for x in (target, student)
            )
        )
    expected = sum((p.exp() * (p - q)).sum(-1) for p, q in parts).mean()
    loss = top_k_kl(h, head, names, logs, fast=False)
    torch.testing.assert_close(loss, expected)
    found = [
        torch.autograd.grad(x, (h, *head.parameters()), retain_graph=True) for x in (loss, expected)
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    full = head_kl(h, head, t, teacher_head, fast=False)
    whole = torch.autograd.grad(full, h)[0]
    away = [
        float(
            (torch.autograd.grad(top_k_kl(h, head, *both, False), h)[0] - whole).norm()
            / whole.norm()
        )
        for k in (2, 10, 30, 40)
        for both in [
            (lambda n, x: (n.long().view(2, 300, -1), x.view(2, 300, -1)))(
                *top_k_log_probs(t.flatten(0, 1), teacher_head, k)
            )
        ]
    ]
    assert away[0] > away[1] > away[2] > away[3] and away[3] < 1e-5


def test_kinds_that_keep_less_come_close(source, tmp_path) -> None:
    model, text, exact = modeling.materialize(REMIX(source)), rows(4), modeling.load(source.origin)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    whole = evaluate_kl(model, exact, text)
    assert whole > 0.05
    sizes = {}
    for kind, far in (
        ("hidden:bfloat16", 0.02),
        ("topk:80", 0.1),
        ("topk:8", 0.9),
        ("topk:97", 1e-5),
    ):
        lessons = CachedTeacher(
            str(source.origin), TeacherCacheConfig(tmp_path / kind, 10**8, kind)
        )
        assert evaluate_kl(model, lessons, text) == pytest.approx(whole, rel=far)
        lessons.flush()
        sizes[kind] = row_store.directory_size(tmp_path / kind)
        again = CachedTeacher(
            str(source.origin), TeacherCacheConfig(tmp_path / kind, 10**8, kind), loads([])
        )
        assert (
            evaluate_kl(model, again, text) == pytest.approx(whole, rel=far)
            and again.loaded is None
        )
    assert sizes["topk:8"] < sizes["topk:80"]


def disk(folder: Path) -> int:
    """What du says, in bytes."""
    return 1024 * int(
        subprocess.run(["du", "-sk", folder], capture_output=True, text=True).stdout.split()[0]
    )


def test_the_size_holds_and_what_has_no_room_is_computed(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(row_store, "FILE_BYTES", 10_000)
    plain, _ = trained(source, modeling.load(source.origin), STAGE, tmp_path / "plain")
    for turn in ("first", "second"):
        lessons = CachedTeacher(str(source.origin), TeacherCacheConfig(tmp_path / "cache", 40_000))
        losses, _ = trained(source, lessons, STAGE, tmp_path / turn)
        told = lessons.flush()
        assert losses == pytest.approx(plain, rel=1e-6, abs=1e-7)
        assert 20_000 < disk(tmp_path / "cache") <= 40_000 and told["refused"] > 0
        assert turn == "first" or 0 < told["computed"] < 8 * 2


def test_damaged_files_are_found_and_made_again(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(row_store, "FILE_BYTES", 4_000)
    keeping, text, model = (
        TeacherCacheConfig(tmp_path, 10**8),
        rows(),
        modeling.materialize(REMIX(source)),
    )
    lessons = CachedTeacher(str(source.origin), keeping)
    whole = evaluate_kl(model, lessons, text)
    lessons.flush()
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) > 3
    flipped = bytearray(files[0].read_bytes())
    flipped[-5] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    files[2].write_bytes(b"")
    (files[3].parent / f"{PART}1-left").write_bytes(b"killed while writing")
    (files[3].parent / "other.part").write_bytes(b"somebody else's")
    again = CachedTeacher(str(source.origin), keeping)
    assert evaluate_kl(model, again, text) == pytest.approx(whole, rel=1e-6)
    told = again.flush()
    assert told["damaged"] == 3 and 0 < told["computed"] == told["kept"] < 8
    assert not list(tmp_path.glob(f"*/{PART}*"))
    assert (files[3].parent / "other.part").read_bytes() == b"somebody else's"
    last = CachedTeacher(str(source.origin), keeping)
    assert evaluate_kl(model, last, text) == pytest.approx(whole, rel=1e-6) and last.computed == 0


def test_another_teacher_or_precision_shares_nothing(tmp_path) -> None:
    for seed in (0, 1):
        tiny("llama", seed=seed)[1].save_pretrained(tmp_path / f"teacher{seed}")
    text, computed = rows(2), []
    for name, kind in (
        ("teacher0", "hidden"),
        ("teacher1", "hidden"),
        ("teacher0", "hidden:bfloat16"),
        ("teacher0", "hidden"),
    ):
        lessons = CachedTeacher(
            str(tmp_path / name), TeacherCacheConfig(tmp_path / "cache", 10**8, kind)
        )
        lessons.fetch_rows(text, False, kind, lessons.compute_outputs)
        lessons.flush()
        computed.append(lessons.computed)
    assert computed == [2, 2, 2, 0]
    moved = dataclasses.replace(text, position_ids=torch.arange(32).expand(2, 32))
    lessons.fetch_rows(moved, False, "hidden", lessons.compute_outputs)
    assert lessons.computed == 2  # the same tokens, other documents


WRITER = """
import sys
from pathlib import Path
import torch
from regraft.train import row_store
row_store.FILE_BYTES = 3000
kept = row_store.RowStore(Path(sys.argv[1]), "rows", 10**7, {})
for number in range(10**6):
    kept.add(f"{sys.argv[2]}{number}", {"value": torch.full((500,), float(number))})
    print(number, flush=True)
"""


@pytest.mark.usefixtures("forked_interpreter")
def test_writers_that_are_killed_leave_whole_files(tmp_path) -> None:
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    for turn in range(2):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, tmp_path, f"{turn}{name}"],
                stdout=subprocess.PIPE,
                env=paths,
            )
            for name in "ab"
        ]
        for process in pair:
            for _ in range(20 + 7 * turn):
                process.stdout.readline()
            process.kill()
            process.wait()
            process.stdout.close()
    kept = RowStore(tmp_path, "rows", 10**7, {})
    kept.scan()
    assert len(kept.places) > 40
    for key in list(kept.places):
        row = kept.get(key)
        assert row is not None and float(row["value"][0]) == int(key[2:])
    assert kept.damaged == 0


def test_bad_settings_are_refused(tmp_path) -> None:
    assert (
        TeacherCacheConfig.parse("a", "1.5 MB", "topk:64").size == 1_500_000
        and TeacherCacheConfig.parse("a", "4G", "hidden").size == 4 * 10**9
    )
    with pytest.raises(RegraftError, match="teacher outputs is 'much': give a number"):
        TeacherCacheConfig.parse("a", "much", "hidden")
    for kind in ("logits", "topk", "topk:0", "hidden:float8"):
        with pytest.raises(RegraftError, match=f"kept as '{kind}': give hidden"):
            TeacherCacheConfig(tmp_path, 1000, kind)
    with pytest.raises(RegraftError, match="0 bytes for teacher outputs"):
        TeacherCacheConfig(tmp_path, 0)
    tiny("bert")[1].save_pretrained(tmp_path / "bert")
    with pytest.raises(RegraftError, match="give a decoder"):
        CachedTeacher(str(tmp_path / "bert"), TeacherCacheConfig(tmp_path, 1000))
    (tmp_path / "file").write_text("")
    with pytest.raises(RegraftError, match="cannot keep teacher outputs in"):
        RowStore(tmp_path / "file", "rows", 1000, {})
    assert (
        teacher_cache.row_keys(rows(2))
        == teacher_cache.row_keys(rows(2))
        != teacher_cache.row_keys(rows(2, 31))
    )
