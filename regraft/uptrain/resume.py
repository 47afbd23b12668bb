"""State of a training run on disk: what changed in the model, the optimiser's moments, where it was."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RegraftError
from .divergence import Place, Trend
from .lit import Watch

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class RunState:
    """`stage`, `step`: what comes next. `tokens`: the stage's budget once a time limit fixed it. `fast`: bfloat16
    chosen. `watch` and `trend`: what the stage has seen of its loss, for `learn: lit` and to know a jump.

    `changed`: names of all parameters any stage has trained. `ledger`: one entry per stage begun. `costs`: FLOPs of the
    stage's steps by what ran in them; counting rounds otherwise, so that a resumed run must count the same steps.
    """

    stage: int = 0
    step: int = 0
    tokens: int = 0
    fast: bool | None = None
    changed: set[str] = field(default_factory=set)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    trend: Trend = field(default_factory=Trend)

    def entry(self, index: int, kind: str, fast: bool) -> dict[str, Any]:
        """The ledger entry of stage `index`."""
        if len(self.ledger) <= index:
            precision = "bfloat16" if fast else "float32"
            zero: dict[str, Any] = {"tokens": 0, "flops": 0, "seconds": 0.0, "flops_per_step": 0}
            self.ledger.append({"stage": index, "kind": kind, "precision": precision, **zero})
        return self.ledger[index]

    def next_stage(self) -> None:
        """Point to the start of the next stage."""
        self.stage, self.step, self.tokens, self.fast = self.stage + 1, 0, 0, None
        self.moments, self.costs, self.watch, self.trend = {}, {}, Watch(), Trend()

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser back its moments."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups if self.moments else []:
            for parameter in group["params"]:
                name = names[id(parameter)]
                if f"step/{name}" in self.moments:  # a layer that was left out of every step so far has none
                    optimizer.state[parameter] = {moment: self.moments[f"{moment}/{name}"] for moment in MOMENTS}
        self.moments = {}

    def trim_metrics(self, path: Path) -> None:
        """Drop rows of steps that will be run again."""
        if not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
        done = (self.stage, self.step)
        again = (self.stage, 0) if self.step == 0 else None  # a stage that begins measures held-out rows itself
        places = [(row["stage"], row["step"]) if "step" in row else (-1, 0) for row in rows]
        kept = [row for row, place in zip(rows, places, strict=True) if place <= done and place != again]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)


def save_state(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: RunState, settings: dict[str, Any]
) -> None:
    """Write `out/run` anew beside the old one, then swap; a kill at any time leaves one of them whole."""
    folder, temporary = out / "run", out / "run.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    named = dict(model.named_parameters())
    tensors = {f"model/{name}": named[name].detach().contiguous() for name in sorted(state.changed)}
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups if optimizer is not None else []:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            tensors |= {f"{moment}/{names[id(parameter)]}": moments[moment] for moment in MOMENTS if moment in moments}
    facts = {key: value for key, value in asdict(state).items() if key != "moments"}
    facts |= {"changed": sorted(state.changed), "settings": settings}
    try:
        if tensors:
            save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(facts))
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:  # safetensors wraps a full disk in an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise RegraftError(
            f"cannot write the checkpoint '{folder}' ({error}): free some space and run again"
        ) from error
    old = out / "run.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(out: Path) -> list[Place]:
    """What can be gone back to in `out`: (stage, steps of it that are done, folder)."""
    folders = [folder for folder in (out / "run", out / "run.old") if (folder / "state.json").exists()]
    facts = [json.loads((folder / "state.json").read_text()) for folder in folders]
    return [(fact["stage"], fact["step"], folder) for fact, folder in zip(facts, folders, strict=True)]


def load_state(out: Path, model: nn.Module, settings: dict[str, Any]) -> RunState:
    """The state in `out/run` with the model's changed weights put back; a fresh state when there is none.

    Raises RegraftError when the run there has other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = next((f for f in (out / "run", out / "run.old") if (f / "state.json").exists()), None)
    if folder is None:
        return RunState()
    facts = json.loads((folder / "state.json").read_text())
    if facts.pop("settings") != json.loads(json.dumps(settings)):
        raise RegraftError(f"'{out}' holds a run with other settings: give another output, or remove '{folder}'")
    facts["changed"], facts["watch"] = set(facts["changed"]), Watch(**facts["watch"])
    facts["trend"] = Trend(**facts.get("trend", {}))
    state = RunState(**facts)
    file = folder / "state.safetensors"
    tensors = load_file(file) if file.exists() else {}
    named = dict(model.named_parameters())
    with torch.no_grad():
        known = [key for key in tensors if key.removeprefix("model/") in named]
        for key in known:
            named[key.removeprefix("model/")].copy_(tensors.pop(key))
    state.moments = tensors
    return state
