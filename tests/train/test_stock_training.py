"""Training stock models: every objective, resumed losses, held-out rows, Adam's state, layers,
drops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, tiny
from helpers.training import (
    CLASSIFIERS,
    FAMILY,
    Killed,
    go,
    rows_of,
    same,
    stage,
    text,
    timeless,
)
from safetensors.torch import load_file, save_file

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.core.moments import FILE as MOMENTS_FILE
from regraft.data.packing import shuffled_indices
from regraft.errors import RegraftError
from regraft.growth import optimizer_state
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.train import loop
from regraft.train import optimizer_state as adam
from regraft.train.objectives import compute_loss, evaluate_objective


@pytest.mark.parametrize("kind", FAMILY)
def test_resumed_losses_equal_uninterrupted(kind: str, tmp_path: Path) -> None:
    stages = [stage(kind), stage(kind, 3)]
    whole, model, ledger = go(tmp_path / "whole", stages)
    assert len(whole) == 7 and ledger["tokens"] == sum(each.tokens for each in stages)
    assert not same(model, tiny(FAMILY[kind])[1]) and all(
        entry["flops"] > 0 for entry in ledger["stages"]
    )
    for cut in (2, 5):
        with pytest.raises(Killed):
            go(tmp_path / str(cut), stages, cut)
        again, other, _ = go(tmp_path / str(cut), stages)
        assert timeless(again) == timeless(whole) and same(model, other)


@pytest.mark.parametrize("family", [*ARCHITECTURES, "gemma2", "mixtral", "gpt_neox", "phi"])
def test_training_brings_the_loss_down(family: str, tmp_path: Path) -> None:
    kind = {"bert": "mask", "roberta": "mask", "vit": "image", "dinov2": "image"}.get(
        family, "next"
    )
    rows, _, _ = go(tmp_path, [stage(kind, 30, lr_body=3e-3, mask_share=0.5)], family=family)
    assert sum(row["loss"] for row in rows[-10:]) < 0.95 * sum(row["loss"] for row in rows[:10])
    assert rows[5]["lr"] == pytest.approx(3e-3)


def test_a_model_without_mixers_has_a_rate_of_its_own(tmp_path: Path) -> None:
    rows, _, _ = go(tmp_path, [stage("next", 4, cooldown=0.1)])
    assert rows[0]["lr"] == pytest.approx(3e-4)


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    for kind, family, message in [
        ("mask", "llama", "LlamaForCausalLM has no head for 'mask'"),
        ("distil", "bert", "BertForMaskedLM has no head for 'next'"),
    ]:
        with pytest.raises(RegraftError, match=message):
            go(tmp_path, [stage(kind)], family=family)
    with pytest.raises(RegraftError, match="the teacher has 97 tokens, the model 101"):
        go(tmp_path, [stage("distil")], keys={"vocab": 101})
    model = tiny("llama")[1]
    with pytest.raises(RegraftError, match="fits mixers, which a LlamaForCausalLM has not"):
        loop.train(loop.Run(model, [stage("align")], lambda length: text(), tmp_path, model))
    with pytest.raises(RegraftError, match="mask_share is 0"):
        stage("mask", mask_share=0)


@pytest.mark.parametrize("kind", ["mask", "distil"])
def test_held_out_rows_are_measured_and_not_counted(kind: str, tmp_path: Path) -> None:
    stages, heldout = [stage(kind, 5), stage(kind, 2)], text(5)
    plain, model, ledger = go(tmp_path / "plain", stages)
    rows, watched, again = go(tmp_path / "watched", stages, heldout=heldout, every=2)
    assert same(model, watched) and timeless([row for row in rows if "loss" in row]) == timeless(
        plain
    )
    assert again["flops"] == ledger["flops"]
    seen = [row for row in rows if "eval_loss" in row]
    assert [(row["stage"], row["step"]) for row in seen] == [
        (0, 0),
        (0, 2),
        (0, 4),
        (0, 5),
        (1, 0),
        (1, 2),
    ]
    assert [row["tokens"] for row in seen] == [0, 96, 192, 240, 0, 96]
    names = {"stage", "step", "tokens", "flops", "seconds", "eval_loss", "eval_accuracy"}
    assert set(seen[0]) == names | ({"eval_kl"} if kind == "distil" else set())
    start = evaluate_objective(tiny(FAMILY[kind])[1], stages[0].objective, heldout)
    assert (seen[0]["eval_loss"], seen[0]["eval_accuracy"]) == (start["loss"], start["accuracy"])
    for cut in (1, 4, 5, 6):
        with pytest.raises(Killed):
            go(tmp_path / str(cut), stages, cut, heldout=heldout, every=2)
        assert timeless(go(tmp_path / str(cut), stages, heldout=heldout, every=2)[0]) == timeless(
            rows
        )
    few, _, _ = go(tmp_path / "few", stages, heldout=heldout)
    assert [(row["stage"], row["step"]) for row in few if "eval_loss" in row] == [
        (0, 0),
        (0, 5),
        (1, 0),
        (1, 2),
    ]


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gpt_neox", "vit", "roberta"])
def test_a_run_goes_on_with_the_moments_of_another(family: str, tmp_path: Path) -> None:
    """The first update is torch's own from that state, whatever the names in the file."""
    kind = {"vit": "image", "roberta": "mask"}.get(family, "next")
    options = {"lr_body": 1e-2, "warmup": 0.0, "cooldown": 0.0, "clip": 1e9}
    _, first, _ = go(
        tmp_path / "first", [stage(kind, 3, **options)], family=family, keep_moments=True
    )
    file = tmp_path / "first" / "optimizer.safetensors"
    first.save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    entries = optimizer_state.read_moments(source, file)
    assert float(entries[f"step/{next(iter(source.names.values()))}"].read()) == 3

    before = {name: value.detach().clone() for name, value in first.named_parameters()}
    run = loop.Run(
        first, [stage(kind, 1, **options)], rows_of(kind, first), tmp_path / "next", moments=file
    )
    twin = tiny(family, architecture=CLASSIFIERS.get(family))[1]
    twin.load_state_dict(first.state_dict())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    adam.load_optimizer_state(twin, optimizer, file)
    order = shuffled_indices(7, 2, 0)
    compute_loss(
        twin,
        run.stages[0].objective,
        rows_of(kind, twin)(24)[order],
        False,
        loop.step_generator(0, 0, 0),
    ).backward()
    optimizer.step()
    loop.train(run)
    for (name, ours), theirs in zip(first.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            ours - before[name], theirs - before[name], rtol=1e-4, atol=1e-5
        )  # of 1e-2
    for key, name in source.names.items():
        stored = entries[f"exp_avg/{name}"].read()
        assert stored.shape == source.tensors[key].shape and bool(stored.any())
    cold = tiny(family, architecture=CLASSIFIERS.get(family))[1]
    cold.load_state_dict({name: value for name, value in before.items()}, strict=False)
    loop.train(loop.Run(cold, [stage(kind, 1, **options)], rows_of(kind, cold), tmp_path / "cold"))
    assert not same(cold, first)


def test_moments_survive_growth_and_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_body": 1e-3}
    _, model, _ = go(tmp_path / "small", [stage("next", 2, **options)], keep_moments=True)
    model.save_pretrained(tmp_path / "source")
    source, steps = Checkpoint.open(tmp_path / "source"), [Widen(hidden=45), Deepen(4)]
    grown = Deepen(4)(Widen(hidden=45)(source))
    grown.save(tmp_path / "grown")
    optimizer_state.grow_optimizer_state(
        source, steps, tmp_path / "small" / MOMENTS_FILE, tmp_path / "grown" / MOMENTS_FILE
    )

    def train(out: Path, stop: int = 9) -> list[float]:
        def progress(*told: Any) -> None:
            if told[1] > stop:
                raise Killed

        begun = tmp_path / "grown" / "optimizer.safetensors"
        run = loop.Run(
            modeling.load(tmp_path / "grown"), [stage("next", 3, **options)], lambda length: text(7), out,
            moments=begun, save_seconds=0, progress=progress,
        )  # fmt: skip
        loop.train(run)
        return [
            json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ]

    with pytest.raises(Killed):
        train(tmp_path / "cut", 1)
    assert train(tmp_path / "cut") == train(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "pickle", "steps", "lost", "shape"])
def test_moments_of_another_model_are_refused(damage: str, tmp_path: Path) -> None:
    go(tmp_path / "first", [stage("next", 1)], keep_moments=True)
    file = tmp_path / "first" / "optimizer.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "steps":
        state = {key: value for key, value in state.items() if not key.startswith("step/")}
    if damage == "lost":
        del state[f"exp_avg_sq/{name}"]
    if damage == "shape":
        state[f"exp_avg/{name}"] = state[f"exp_avg/{name}"][1:]
    if damage == "pickle":
        file = file.with_suffix(".pt")
    save_file(state, file)
    if damage == "gone":
        file.unlink()
    expected = {
        "steps": "counts no steps",
        "lost": f"holds nothing as exp_avg_sq of '{name}'",
        "shape": f"holds nothing as exp_avg of '{name}'",
    }
    with pytest.raises(
        RegraftError, match=expected.get(damage, "no optimiser state|check the file")
    ):
        go(tmp_path / "next", [stage("next", 1)], moments=file)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_a_grown_model_in_memory_can_be_checkpointed(family: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    model = modeling.materialize(Widen(hidden=2 * source.sizes["hidden"])(source))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    kind = "mask" if family == "bert" else "next"
    loop.train(
        loop.Run(model, [stage(kind)], rows_of(kind, model), tmp_path / "run", save_seconds=0)
    )
