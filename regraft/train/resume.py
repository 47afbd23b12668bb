"""State of a training run on disk: what changed in the model, the optimiser's moments, where it was."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .. import distributed
from ..errors import RegraftError
from ..io.files import sync, write_json_lines
from ..io.shard_writer import check_space
from .divergence import LossTrend, Place
from .fsdp import distribute_like
from .lit import LitState

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
RUN, KEPT_CHECKPOINTS = "run", 2


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
    watch: LitState = field(default_factory=LitState)
    trend: LossTrend = field(default_factory=LossTrend)

    def ledger_entry(self, index: int, kind: str, fast: bool) -> dict[str, Any]:
        """The ledger entry of stage `index`."""
        if len(self.ledger) <= index:
            precision = "bfloat16" if fast else "float32"
            zero: dict[str, Any] = {"tokens": 0, "flops": 0, "seconds": 0.0, "flops_per_step": 0}
            self.ledger.append({"stage": index, "kind": kind, "precision": precision, **zero})
        return self.ledger[index]

    def advance_stage(self) -> None:
        """Point to the start of the next stage."""
        self.stage, self.step, self.tokens, self.fast = self.stage + 1, 0, 0, None
        self.moments, self.costs, self.watch, self.trend = {}, {}, LitState(), LossTrend()

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser back its moments."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups if self.moments else []:
            for parameter in group["params"]:
                name = names[id(parameter)]
                if (
                    f"step/{name}" in self.moments
                ):  # a layer that was left out of every step so far has none
                    found = {moment: self.moments[f"{moment}/{name}"] for moment in MOMENTS}
                    optimizer.state[parameter] = {
                        moment: place_moment(one, parameter) for moment, one in found.items()
                    }
        self.moments = {}

    def trim_metrics(self, path: Path) -> None:
        """Drop rows of steps that will be run again."""
        if not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
        done = (self.stage, self.step)
        again = (
            (self.stage, 0) if self.step == 0 else None
        )  # a stage that begins measures held-out rows itself
        places = [(row["stage"], row["step"]) if "step" in row else (-1, 0) for row in rows]
        kept = [
            row for row, place in zip(rows, places, strict=True) if place <= done and place != again
        ]
        write_json_lines(path, kept)


def place_moment(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment where its parameter is; one that was read whole, since its parameter came later, is laid out like it."""
    whole = moment.shape == parameter.shape and not isinstance(moment, DTensor)
    return distribute_like(moment, parameter) if whole else moment.to(parameter.device)


def checkpoint_name(state: RunState) -> str:
    """Name of a state's checkpoint."""
    return f"stage-{state.stage}-step-{state.step}"


def list_checkpoints(out: Path) -> list[Place]:
    """Whole checkpoints of a run, the newest last: (stage, steps of it that are done, folder)."""
    found = [file.parent for file in (out / RUN).glob("stage-*-step-*/state.json")]
    return sorted(
        (int(name[1]), int(name[3]), folder) for folder in found if (name := folder.name.split("-"))
    )


def save_state(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: RunState,
    settings: dict[str, Any],
) -> Path:
    """Write a checkpoint of all processes (PyTorch DCP) and put it in place whole; the last two are kept.

    RegraftError in every process when one cannot write; what was there before stays.
    """
    folder, temporary = out / RUN / checkpoint_name(state), out / RUN / "new"
    facts = {key: value for key, value in asdict(state).items() if key != "moments"}
    facts |= {"changed": sorted(state.changed), "settings": settings}

    tensors = checkpoint_tensors(model, optimizer, state)

    def create_folder() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_space(
            temporary, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        )

    def publish_folder() -> None:
        (temporary / "state.json").write_text(json.dumps(facts))
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for *_, old in list_checkpoints(out)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    try:
        distributed.on_rank0(create_folder)
        if tensors:
            with silence_dcp_warning():
                dcp.save(tensors, checkpoint_id=temporary)
        distributed.on_rank0(publish_folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        if distributed.is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
        raise RegraftError(
            f"cannot write the checkpoint '{folder}' ({format_cause(error)}): free some space and run again"
        ) from error
    return folder


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Only this run writes in `out`; RegraftError while another one does. The system lets go when a process dies."""
    lock = FileLock(out / RUN / "lock")

    def acquire_lock() -> None:
        (out / RUN).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)

    try:
        distributed.on_rank0(acquire_lock)
    except Timeout as error:
        raise RegraftError(
            f"another run is going on in '{out}': wait for it, or stop all of its processes"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def silence_dcp_warning() -> Iterator[None]:
    """Inside, DCP does not remark that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def format_cause(error: BaseException) -> str:
    """The first cause, in a line."""
    first: Any = (
        next(iter(error.failures.values()), error)
        if isinstance(error, CheckpointException)
        else error
    )
    return " ".join(str(first[0] if isinstance(first, tuple) else first).split())


def checkpoint_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, state: RunState
) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters that any stage has trained, and the optimiser's moments."""
    named = dict(model.named_parameters())
    tensors = {f"model/{name}": named[name].detach() for name in sorted(state.changed)}
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups if optimizer is not None else []:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            tensors |= {
                f"{moment}/{names[id(parameter)]}": moments[moment]
                for moment in MOMENTS
                if moment in moments
            }
    return tensors


def load_state(out: Path, model: nn.Module, settings: dict[str, Any]) -> RunState:
    """The newest state in `out/run` with the model's changed weights put back; a fresh state when there is none.

    Raises RegraftError when the run there has other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    newest = distributed.broadcast(
        next((folder for *_, folder in reversed(list_checkpoints(out))), None)
    )
    if newest is None:
        return RunState()
    facts = json.loads((newest / "state.json").read_text())
    if facts.pop("settings") != json.loads(json.dumps(settings)):
        raise RegraftError(
            f"'{out}' holds a run with other settings: give another output, or remove '{out / RUN}'"
        )
    facts["changed"], facts["watch"] = set(facts["changed"]), LitState(**facts["watch"])
    facts["trend"] = LossTrend(**facts.get("trend", {}))
    state = RunState(**facts)
    if (newest / ".metadata").exists():
        state.moments = read_checkpoint(newest, dict(model.named_parameters()))
    return state


def read_checkpoint(folder: Path, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read a checkpoint: values of the model's parameters go into these, the rest is returned.

    Each process reads what it holds, however many wrote it.
    """
    wanted: dict[str, Tensor] = {}
    for key, facts in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        kind, _, name = key.partition("/")
        assert isinstance(facts, TensorStorageMetadata)
        if kind == "model" and name in named:
            wanted[key] = named[name].detach()
        elif name in named and facts.size == named[name].shape:
            wanted[key] = torch.zeros_like(named[name], requires_grad=False)
        else:
            wanted[key] = torch.zeros(facts.size, dtype=facts.properties.dtype)
    with silence_dcp_warning():
        dcp.load(wanted, checkpoint_id=folder)
    return {key: value for key, value in wanted.items() if key.removeprefix("model/") not in named}
