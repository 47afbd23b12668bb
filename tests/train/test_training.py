"""Uptraining: packing, losses, groups, the closed-form start, and a resumed run that equals the
uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny
from helpers.training import Killed, Letters, text_rows
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.packing import long_windows, pack, read_documents, shuffled_indices
from regraft.errors import RegraftError
from regraft.mixers import registry
from regraft.mixers.attention import Attention
from regraft.mixers.gated import GatedMixer
from regraft.mixers.remix import Remix
from regraft.train import loop
from regraft.train.align import align_step
from regraft.train.attention_statistics import AttentionStatistics, compute_attention_statistics
from regraft.train.calibrate import calibrate, output_error
from regraft.train.distill import distil_step
from regraft.train.fit_mixer import fit_mixer, gate_candidates
from regraft.train.hooks import LayerRecord, record_layers, run_decoder
from regraft.train.kl import head_kl
from regraft.train.optimizer import parameter_groups
from regraft.train.stage import Stage

REMIX = Remix("gated_deltanet", "0", window=8, sinks=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    tiny("llama", layers=3)[1].save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture
def pair(source: Checkpoint) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    teacher = modeling.materialize(source)
    return modeling.materialize(REMIX(source)), teacher, modeling.slots(teacher, source)


def test_packing_restarts_positions_and_loses_nothing() -> None:
    documents = ["a" * 5, "b" * 11, "c" * 40]
    packed = pack(documents, Letters(), 16)
    assert packed.input_ids.shape == (
        3,
        16,
    )  # 59 tokens with ends of documents: three rows, 11 left over
    expected = [*range(6), *range(10), *range(2), *range(14), *range(16)]
    assert packed.position_ids.flatten().tolist() == expected
    assert packed.segments()[0].tolist() == [0] * 6 + [1] * 10
    windows = long_windows(documents, Letters(), 16)
    assert windows.input_ids.shape == (2, 16) and windows.segments() is None
    with pytest.raises(RegraftError, match="59 tokens, less than one row of 64"):
        pack(documents, Letters(), 64)
    with pytest.raises(RegraftError, match="no document has 64 tokens"):
        long_windows(documents, Letters(), 64)


def test_reading_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nstill one\n\n\ntwo\u2028still two\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three\u2028"}) + "\n\n")
    assert read_documents(tmp_path) == ["one\n\nstill one", "two\u2028still two", "three\u2028"]
    bad = {
        "empty.txt": (b" \n\n\n ", "no text in"),
        "latin.txt": ("caf\xe9".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
        "text.csv": (b"x", "must end in .txt, .jsonl or .json, also compressed"),
        "line.jsonl": (b'{"text": "x"}\n{"txt": 3}\n', "line 2 has no string field 'text'"),
        "broken.jsonl": (b'{"text": "x"\n', "line 1 is not JSON"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RegraftError, match=message):
            read_documents(tmp_path / name)
    with pytest.raises(RegraftError, match="no text at .*missing"):
        read_documents(tmp_path / "missing.txt")


def test_shuffled_passes_are_whole_and_extendable() -> None:
    order = shuffled_indices(5, 12, seed=1)
    assert sorted(order[:5].tolist()) == sorted(order[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(shuffled_indices(5, 7, seed=1), order[:7])


@pytest.mark.parametrize("bias", [False, True])
def test_sliced_kl_equals_the_definition_with_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    h, t = torch.randn(2, 300, 6, requires_grad=True), torch.randn(2, 300, 6)
    head, teacher_head = nn.Linear(6, 40, bias=bias), nn.Linear(6, 40, bias=bias)
    target, student = teacher_head(t).log_softmax(-1).detach(), head(h).log_softmax(-1)
    expected = (target.exp() * (target - student)).sum(-1).mean()
    loss = head_kl(h, head, t, teacher_head, fast=False)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        *(torch.autograd.grad(x, (h, head.weight), retain_graph=True) for x in (loss, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_groups_follow_where_a_weight_came_from(
    pair: tuple[nn.Module, nn.Module, list[nn.Module]],
) -> None:
    model = pair[0]
    stage = Stage("distil", 64, length=32, lr_new=1.0, lr_mixer=0.1, lr_body=0.01, weight_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    rates = {
        named[id(p)]: (g["peak"], g["weight_decay"])
        for g in parameter_groups(model, stage)
        for p in g["params"]
    }
    assert set(rates) == set(named.values())
    slot = "model.layers.1.self_attn.mixer"
    assert rates[f"{slot}.gate.weight"] == (1.0, 0.0) and rates[f"{slot}.linear.rate"] == (1.0, 0.0)
    for name in ("linear.k_proj", "o_proj"):
        assert rates[f"{slot}.{name}.weight"] == (0.1, 0.5)
    assert rates["model.layers.0.self_attn.q_proj.weight"] == (0.01, 0.5)
    assert rates["model.norm.weight"] == (0.01, 0.0)
    align = parameter_groups(model, dataclasses.replace(stage, kind="align"))
    trained = {named[id(p)] for group in align for p in group["params"]}
    assert all(".mixer." in name for name in trained) and len(trained) < len(named)
    assert not model.model.norm.weight.requires_grad
    with pytest.raises(RegraftError, match="trains nothing"):
        parameter_groups(model, Stage("align", 64, length=32, lr_new=0, lr_mixer=0))


def test_align_gradient_is_that_of_the_layer_alone(
    pair: tuple[nn.Module, nn.Module, list[nn.Module]],
) -> None:
    model, teacher, slots = pair
    rows = text_rows(1)
    parameter_groups(model, Stage("align", 32, length=32))
    loss = align_step(model, teacher, slots, rows, fast=False)
    got = model.slots()[2].mixer.linear.q_proj.weight.grad.clone()
    records: dict[int, Any] = {}
    with record_layers(slots, [1, 2], records.__setitem__):
        run_decoder(teacher, rows.input_ids, rows.position_ids)
    errors = [
        output_error(model.slots()[i].mixer, records[i], records[i].mixer_context(None))
        for i in (1, 2)
    ]
    assert loss == pytest.approx(float(sum(errors).detach()) / 2, rel=1e-5)
    model.zero_grad()
    errors[1].backward()
    torch.testing.assert_close(got, model.slots()[2].mixer.linear.q_proj.weight.grad)


def test_a_student_equal_to_its_teacher_has_no_kl(source: Checkpoint) -> None:
    teacher, student = modeling.materialize(source), modeling.materialize(Remix(keep="all")(source))
    assert abs(distil_step(student, teacher, text_rows(2), fast=False)) < 1e-6


STARTED = [
    REMIX,
    Remix("supra", "0", window=0),
    Remix("supra", "0", window=0, options={"decays": "learned"}),
    Remix(
        "lightning",
        "0",
        window=8,
        sinks=2,
        options={"decays": "learned", "grouped": True, "norm": "none"},
    ),
    Remix("gated_deltanet", "0", window=0),
    Remix("retnet", "0", window=0, options={"gate": "none"}),
    Remix("lightning", "0", window=8, sinks=2, options={"norm": "none"}),
    Remix("t2r", "0", window=0),
    Remix("hedgehog", "0", window=8, sinks=2),
    Remix("hedgehog", "0", window=8, sinks=2, options={"norm": "rms"}),
    Remix("lolcats", "0", window=0, options={"window": 4}),
    Remix("gla", "0", window=0, options={"gate": "none"}),
    Remix(
        "gla", "0", window=8, sinks=2, options={"gate_from": "keys", "gate": "none", "norm": "none"}
    ),
    Remix("rwkv6", "0", window=0, options={"gate": "none"}),
    Remix(
        "rwkv6", "0", window=8, sinks=2, options={"gate": "none", "norm": "none", "decay": "static"}
    ),
]


@pytest.mark.parametrize(
    "remix", STARTED, ids=lambda remix: f"{remix.mixer}-{remix.window}-{len(remix.options)}"
)
def test_closed_form_start_brings_layers_closer(source: Checkpoint, remix: Remix) -> None:
    model, teacher = modeling.materialize(remix(source)), modeling.materialize(source)
    slots, rows = modeling.slots(teacher, source), text_rows(64, 64)
    held: dict[int, Any] = {}
    with record_layers(slots, [1, 2], held.__setitem__):
        run_decoder(teacher, rows.input_ids[32:], rows.position_ids[32:])

    def errors() -> list[float]:
        with torch.no_grad():
            return [
                float(output_error(model.slots()[i].mixer, held[i], held[i].mixer_context(None)))
                for i in (1, 2)
            ]

    before = errors()
    report = list(
        calibrate(model.slots(), teacher, slots, loop.calibration_batches(rows[:32], 32, 0))
    )
    assert [row["layer"] for row in report] == [1, 2] and all(
        row["heads_folded"] != (remix.window > 0 and remix.options.get("norm") == "rms")
        for row in report
    )
    after = errors()
    assert sum(after) < sum(before), (before, after)


def test_calibration_without_time_uses_one_batch_and_says_so(source: Checkpoint) -> None:
    teacher, rows = modeling.materialize(source), text_rows(64, 64)
    slots, batches = modeling.slots(teacher, source), loop.calibration_batches(rows, 64, 0)
    for seconds, count in ((0.0, 1), (None, len(batches)), (3600.0, len(batches))):
        model = modeling.materialize(REMIX(source))
        report = list(calibrate(model.slots(), teacher, slots, batches, seconds=seconds))
        tokens = sum(ids.numel() for ids, _, _ in batches[:count])
        assert [row["tokens"] for row in report] == [tokens, tokens] and len(batches) > 1


def fitted_gate(
    records: list[tuple[LayerRecord, AttentionStatistics]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the last gate candidate."""
    last = gate_candidates(records)[-1]
    return last[:-1].T, last[-1]


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("grouped", [False, True])
@torch.no_grad()
def test_calibration_finds_the_half_lives_that_made_the_teacher(window: int, grouped: bool) -> None:
    """Where the teacher is the mixer itself with half-lives that calibration tries, it finds them,
    state by state.
    """
    torch.manual_seed(0)
    attention = Attention(hidden=24, kv=2, group=2, dim=8, scale=8**-0.5, rotary=False)
    spec = {"name": "lightning", "norm": "none", "grouped": grouped, "decays": "learned"}
    whole = {
        "name": "gated",
        "linear": spec,
        "window": {"name": "window", "window": window, "sinks": 2},
    }
    mixer = registry.build(whole if window else spec, attention)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    linear = mixer.linear if isinstance(mixer, GatedMixer) else mixer
    planted = torch.tensor([50.0, 3.0] if grouped else [1.5, 50.0, 6.0, 250.0])
    linear.set_half_lives(planted)
    x = torch.randn(2, 120, attention.hidden)
    record = LayerRecord(x, x, None)
    seen = compute_attention_statistics(linear, record, None, window, 2)
    target = linear.mix(x, record.mixer_context(None), None)[0].transpose(1, 2)
    if isinstance(mixer, GatedMixer):
        near = mixer.window.mix(x, record.mixer_context(None), None)[0].transpose(1, 2)
        gate = F.linear(x, *fitted_gate([(record, seen)])).sigmoid().transpose(1, 2).unsqueeze(-1)
        target = gate * target + (1 - gate) * near
    linear.set_half_lives(torch.ones(len(planted)))
    fit_mixer(mixer, [(record, dataclasses.replace(seen, heads=target))], [None])
    torch.testing.assert_close(
        math.log(2) / -linear.decays(torch.zeros(1, len(planted), 1, 8))[0, :, 0], planted
    )


THREE = [
    Stage("align", 4 * 64, length=32, batch=2, precision="float32"),
    Stage("distil", 5 * 32, length=32, precision="float32"),
    Stage("next", 2 * 32, length=32, precision="float32", weight_decay=0.1),
]


def train_three_stages(
    source: Checkpoint, out: Path, stop_after: int | None = None
) -> tuple[list[float], nn.Module]:
    """Losses and the model; Killed after some steps."""
    teacher, model, done = modeling.materialize(source), modeling.materialize(REMIX(source)), 0

    def progress(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if stop_after is not None and done > stop_after:
            raise Killed

    slots = modeling.slots(teacher, source)
    run = loop.Run(
        model,
        THREE,
        lambda length: text_rows(),
        out,
        teacher,
        slots,
        progress=progress,
        save_seconds=0,
    )
    ledger = loop.train(run)
    assert ledger["tokens"] == sum(stage.steps * stage.batch * stage.length for stage in THREE)
    assert all(entry["flops"] > 0 for entry in ledger["stages"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], model


@pytest.fixture(scope="module")
def uninterrupted(
    source: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], nn.Module]:
    return train_three_stages(source, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_resumed_losses_equal_uninterrupted(
    source: Checkpoint, uninterrupted: tuple[list[float], nn.Module], tmp_path: Path, cut: int
) -> None:
    whole, model = uninterrupted
    assert len(whole) == 11
    with pytest.raises(Killed):
        train_three_stages(source, tmp_path, cut)
    resumed, again = train_three_stages(source, tmp_path)
    assert resumed == whole
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_refuses_other_settings(source: Checkpoint, tmp_path: Path) -> None:
    def go(seed: int) -> None:
        model = modeling.materialize(REMIX(source))
        loop.train(
            loop.Run(
                model,
                [Stage("next", 32, length=32)],
                lambda length: text_rows(),
                tmp_path,
                seed=seed,
            )
        )

    go(0)
    with pytest.raises(RegraftError, match="other settings"):
        go(1)


def test_time_limit_shortens_a_stage_and_survives_resume(
    source: Checkpoint, tmp_path: Path
) -> None:
    model = modeling.materialize(REMIX(source))
    stage = Stage("next", 10_000 * 32, length=32, precision="float32")
    ledger = loop.train(
        loop.Run(model, [stage], lambda length: text_rows(), tmp_path, limit=lambda index: 0.5)
    )
    assert 32 <= ledger["tokens"] < stage.tokens
    rates = [
        json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-1] <= 0.5 * stage.lr_new  # the schedule fits the shortened stage


@pytest.mark.parametrize("later", [0.25, 4.0])
def test_a_machine_that_changes_its_speed_still_keeps_the_time(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: float
) -> None:
    """A step takes a second of a clock that the test turns, `later` seconds from step 20 on."""
    clock, total = [0.0], 100.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def turn(stage: Stage, step: int, steps: int, row: Any) -> None:
        clock[0] += 1.0 if step < 20 else later

    model = modeling.materialize(REMIX(source))
    stage = Stage("next", 10_000 * 32, length=32, precision="float32")
    run = loop.Run(
        model, [stage], lambda length: text_rows(), tmp_path,
        limit=lambda index: total - clock[0], progress=turn,
    )  # fmt: skip
    loop.train(run)
    assert clock[0] == pytest.approx(total, rel=0.1)


def test_a_slow_machine_learns_at_the_full_rate_soon(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven steps fit, of ten thousand: each takes a second of a clock that the test turns."""
    clock, total = [0.0], 7.5
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    step = loop.train_step

    def turn(*given: Any) -> Any:
        clock[0] += 1.0
        return step(*given)

    monkeypatch.setattr(loop, "train_step", turn)
    model = modeling.materialize(REMIX(source))
    stage = Stage("next", 10_000 * 32, length=32, precision="float32", cooldown=0.1)
    run = loop.Run(
        model, [stage], lambda length: text_rows(), tmp_path, limit=lambda index: total - clock[0]
    )
    loop.train(run)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] / stage.lr_new for line in lines]
    assert len(rates) == 7 and rates == pytest.approx([0.25, *[1.0] * 6])


def test_stages_without_their_teacher_or_tokens_are_refused(
    source: Checkpoint, tmp_path: Path
) -> None:
    model = modeling.materialize(REMIX(source))
    with pytest.raises(RegraftError, match="'distil' needs a teacher"):
        loop.train(
            loop.Run(model, [Stage("distil", 64, length=32)], lambda length: text_rows(), tmp_path)
        )
    with pytest.raises(RegraftError, match="10 tokens, less than one step of 1 x 1024"):
        Stage("next", 10)
