"""Low-rank additions: the same losses as with layers that hold them, nothing else moves, a resumed
run is the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny, tokens
from torch.nn.utils import parametrize

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.mixers.older_names import first_name, rename_older
from regraft.mixers.remix import Remix
from regraft.train import loop, resume
from regraft.train.optimizer import parameter_groups, projection_names
from regraft.train.stage import Stage

STAGE = Stage(
    "next",
    tokens=6 * 2 * 24,
    length=24,
    batch=2,
    rank=3,
    lr_mixer=1e-2,
    lr_new=1e-2,
    precision="float32",
)


class Added(torch.nn.Module):
    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach() + 2.0 * self.b @ self.a


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    tiny("qwen2")[1].save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


def student(source: Checkpoint) -> Any:
    return modeling.materialize(Remix(keep="1", window=8, sinks=2)(source))


def rows(length: int) -> Packed:
    ids = tokens(16, length)
    return Packed(ids, torch.arange(length).expand_as(ids), torch.zeros(len(ids)))


def losses(out: Path) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_those_of_layers_that_hold_the_additions(
    source: Checkpoint, tmp_path: Path
) -> None:
    model, twin = student(source), student(source)
    before = {name: value.clone() for name, value in model.named_parameters()}
    loop.train(loop.Run(model, [STAGE], rows, tmp_path / "run"))
    names = projection_names(model)
    assert {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    } <= {name for name in before if ".mixer." in name}
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in names)
    change = model.get_parameter(names[0]) - before[names[0]]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    assert not any("low_rank" in name for name in model.state_dict())

    new = [
        p
        for g in parameter_groups(twin, dataclasses.replace(STAGE, rank=0, learn="new"))
        for p in g["params"]
    ]
    low = loop.attach_lora(twin, names, 3, 0, {})
    drawn = {
        name: (low.a[name.replace(".", "/")].detach(), low.b[name.replace(".", "/")].detach())
        for name in names
    }
    loop.detach_lora(twin)
    added = []
    for name in names:
        place, _, last = name.rpartition(".")
        module = Added(*drawn[name])
        parametrize.register_parametrization(twin.get_submodule(place), last, module)
        added += [module.a, module.b]
    for parameter in [*new, *added]:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW([*added, *new], betas=(0.9, 0.95), weight_decay=0.0)
    order = loop.shuffled_indices(16, 12, 0)
    for step, expected in enumerate(losses(tmp_path / "run")):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * STAGE.lr_factor(step)
        ids = rows(24).input_ids[order[2 * step : 2 * step + 2]]
        loss = F.cross_entropy(
            twin(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        assert float(loss.detach()) == pytest.approx(expected, rel=2e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*added, *new], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def write_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write the names that earlier versions gave to projections."""
    save, gather = loop.save_state, resume.checkpoint_tensors

    def save_older(out: Path, model: Any, optimizer: Any, state: Any, settings: Any) -> Path:
        older = dataclasses.replace(state, changed={*map(first_name, state.changed)})
        return save(out, model, optimizer, older, settings)

    def gather_older(model: Any, optimizer: Any, state: Any) -> dict[str, torch.Tensor]:
        today = dataclasses.replace(state, changed={*map(rename_older, state.changed)})
        tensors = gather(model, optimizer, today)
        assert any(first_name(name) != name for name in tensors)
        return {first_name(name): value for name, value in tensors.items()}

    monkeypatch.setattr(loop, "save_state", save_older)
    monkeypatch.setattr(resume, "checkpoint_tensors", gather_older)


@pytest.mark.parametrize("names", ["today's", "older"])
def test_a_run_that_goes_on_is_the_same(
    names: str, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = student(source)
    loop.train(loop.Run(whole, [STAGE, STAGE], rows, tmp_path / "whole"))
    write, seen = loop.write_metrics_row, []

    def dying(run: loop.Run, row: dict) -> None:
        write(run, row)
        seen.append(row)
        if len(seen) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_metrics_row", dying)
    if names == "older":
        write_older_names(monkeypatch)
    run = loop.Run(student(source), [STAGE, STAGE], rows, tmp_path / "cut", save_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    monkeypatch.undo()
    again = student(source)
    loop.train(dataclasses.replace(run, model=again))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="rank is 0 or more"):
        Stage("align", tokens=48, length=24, rank=2)
    with pytest.raises(RegraftError, match="there are none"):
        loop.train(loop.Run(tiny("llama")[1], [STAGE], rows, tmp_path))
