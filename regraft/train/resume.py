"""Checkpoints of a training run: changed weights, the optimiser's moments, how far it came."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .. import distributed
from ..core.moments import MOMENTS, STEP
from ..errors import RegraftError
from ..io.files import read_json, read_json_lines, sync, write_json_lines
from ..io.shard_writer import check_space
from ..io.typed import convert
from ..mixers.older_names import rename_older
from .checkpoint_files import (
    DamagedCheckpointError,
    TensorReader,
    TensorWriter,
    check_files,
    read_metadata,
    write_manifest,
)
from .divergence import LossTrend, Place
from .fsdp import distribute_like
from .lit import LitState
from .metrics import MetricsRow
from .output import RUN, check_settings, lock_run
from .records import LedgerEntry

__all__ = ["RunState", "list_checkpoints", "load_state", "lock_run", "save_state"]

KEPT_CHECKPOINTS = 2
ADAM_STATE = (*MOMENTS, STEP)  # Adam's tensors of one parameter
FOLDER_NAME = re.compile(r"stage-(\d{1,9})-step-(\d{1,9})")


@dataclass
class RunState:
    """How far a run has come. All fields but `moments` are written to state.json.

    Attributes:
        stage: number of the stage that is next, from 0.
        step: steps of that stage that are done.
        tokens: the stage's budget once a time limit has fixed it, 0 before.
        fast: whether the stage computes in bfloat16; None until it starts.
        changed: names of all parameters that any stage has trained.
        ledger: one entry for each stage that has started.
        moments: Adam's tensors from a checkpoint, as `exp_avg/NAME`; empty once the optimiser
            has them.
        costs: FLOPs of the stage's steps by what ran in them. A second count may differ in
            rounding, and a resumed run must report the same numbers, so they are stored.
        watch: what the stage has seen of its loss, for `learn: lit`.
        trend: the same, for the detection of loss spikes.
    """

    stage: int = 0
    step: int = 0
    tokens: int = 0
    fast: bool | None = None
    changed: set[str] = field(default_factory=set)
    ledger: list[LedgerEntry] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    watch: LitState = field(default_factory=LitState)
    trend: LossTrend = field(default_factory=LossTrend)

    def ledger_entry(self, index: int, kind: str, fast: bool) -> LedgerEntry:
        """The ledger entry of stage `index`, which is added when the stage starts."""
        if len(self.ledger) <= index:
            self.ledger.append(
                {
                    "stage": index,
                    "kind": kind,
                    "precision": "bfloat16" if fast else "float32",
                    "tokens": 0,
                    "flops": 0,
                    "seconds": 0.0,
                    "flops_per_step": 0,
                }
            )
        return self.ledger[index]

    def advance_stage(self) -> None:
        """Point to the start of the next stage."""
        self.stage, self.step, self.tokens, self.fast = self.stage + 1, 0, 0, None
        self.moments, self.costs, self.watch, self.trend = {}, {}, LitState(), LossTrend()

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser the moments of the checkpoint, if there are any."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        for group in optimizer.param_groups if self.moments else []:
            for parameter in group["params"]:
                name = names[id(parameter)]
                # A layer that was left out of every step so far has no moments.
                if f"{STEP}/{name}" in self.moments:
                    optimizer.state[parameter] = {
                        key: place_moment(self.moments[f"{key}/{name}"], parameter)
                        for key in ADAM_STATE
                    }

        self.moments = {}

    def trim_metrics(self, path: Path) -> None:
        """Drop the rows of steps that will run again, and a last line cut short by a kill."""
        if not path.exists():
            return
        rows = read_json_lines(path, MetricsRow)
        write_json_lines(path, [row for row in rows if self.includes_row(row)])

    def includes_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of metrics.jsonl belongs to the steps that are done."""
        if "step" not in row:
            return True
        position, done = (row["stage"], row["step"]), (self.stage, self.step)
        # A stage that starts evaluates the held-out rows, so its row for step 0 comes again.
        starts_again = self.step == 0 and position == done
        return position <= done and not starts_again


def place_moment(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment on the device of its parameter, and sharded like it.

    A moment whose parameter did not exist when the checkpoint was read (LoRA) was read whole.
    """
    whole = moment.shape == parameter.shape and not isinstance(moment, DTensor)
    return distribute_like(moment, parameter) if whole else moment.to(parameter.device)


def checkpoint_name(state: RunState) -> str:
    """Name of a state's checkpoint folder."""
    return f"stage-{state.stage}-step-{state.step}"


def list_checkpoints(out: Path) -> list[Place]:
    """The checkpoints of a run, newest last: (stage, its steps that are done, folder).

    A folder gets its name when it is complete. It may have been damaged since then.
    """
    numbered = []
    for folder in (out / RUN).glob("stage-*-step-*"):
        if (match := FOLDER_NAME.fullmatch(folder.name)) and folder.is_dir():
            numbered.append((int(match[1]), int(match[2]), folder))
    return sorted(numbered)


def describe_newest(out: Path) -> str:
    """What `StopSignals.exit_process` says is kept: the newest checkpoint, empty without one."""
    return f"'{found[-1][2]}' is" if (found := list_checkpoints(out)) else ""


def save_state(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: RunState,
    settings: Mapping[str, Any],
) -> Path:
    """Write a checkpoint of all processes with PyTorch DCP; the newest two are kept.

    RegraftError in every process when one of them cannot write; earlier checkpoints stay.

    Args:
        out: the output folder; the checkpoint goes to `out/run/stage-S-step-N`.
        model: its parameters named in `state.changed` are saved.
        optimizer: its moments are saved; None between two stages.
        state: what else is needed to resume.
        settings: must be the same when the run is resumed, see `load_state`.

    Returns:
        The checkpoint's folder.
    """
    folder, temporary = out / RUN / checkpoint_name(state), out / RUN / "new"
    facts = {key: value for key, value in asdict(state).items() if key != "moments"}
    facts |= {"changed": sorted(state.changed), "settings": settings}
    tensors = checkpoint_tensors(model, optimizer, state)

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def create_folder() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_space(temporary, size)

    def publish_folder() -> None:
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync(folder.parent)

        # A later one than this is damaged: the run went back to the one before it.
        places = list_checkpoints(out)
        now = places.index((state.stage, state.step, folder)) + 1
        for *_, old in (*places[: max(0, now - KEPT_CHECKPOINTS)], *places[now:]):
            shutil.rmtree(old)

    # The folder takes its name only after every process has written its part. A kill at any
    # moment leaves the checkpoints that were complete before.
    try:
        distributed.on_rank0(create_folder)
        if tensors:
            with silence_dcp_warning():
                dcp.save(tensors, storage_writer=TensorWriter(temporary))
        distributed.on_rank0(lambda: (temporary / "state.json").write_text(json.dumps(facts)))
        write_manifest(temporary)
        distributed.on_rank0(publish_folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = format_cause(error)
        if distributed.is_rank0():
            # On a full disk PyTorch only says that a file did not grow as it should have.
            if shutil.disk_usage(out).free < size:
                cause = os.strerror(errno.ENOSPC)
            shutil.rmtree(temporary, ignore_errors=True)
        raise RegraftError(
            f"cannot write the checkpoint '{folder}' ({cause}): free some space and run again"
        ) from error
    return folder


@contextmanager
def silence_dcp_warning() -> Iterator[None]:
    """Inside, DCP does not warn that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def format_cause(error: BaseException) -> str:
    """The first cause of an error, on one line."""
    cause: Any = error
    # DCP gathers one failure a rank, each an exception or an (exception, traceback) pair.
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()), error)
    if isinstance(cause, tuple):
        cause = cause[0]
    return " ".join(str(cause).split())


def checkpoint_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, state: RunState
) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `model/NAME` of parameters that any stage has trained, and
    the optimiser's `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`.
    """
    named = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    tensors = {f"model/{name}": named[name].detach() for name in sorted(state.changed)}
    if optimizer is None:
        return tensors

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # A parameter that no step has used has no state yet.
            adam, name = optimizer.state.get(parameter, {}), names[id(parameter)]
            tensors |= {f"{key}/{name}": adam[key] for key in ADAM_STATE if key in adam}
    return tensors


def load_state(out: Path, model: nn.Module, settings: Mapping[str, Any]) -> RunState:
    """The newest whole state in `out/run`, or a new one when there is no checkpoint.

    The weights that the run had changed are put back into `model`. Damaged checkpoints are left out
    with a line on standard error. RegraftError when none is whole, and when the run there has other
    settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    # All processes must resume from the same folder: the newest whole one that the first one sees.
    places = distributed.broadcast(list_checkpoints(out))
    problems: list[str] = []
    for *_, folder in reversed(places):
        try:
            check_files(folder)
            facts, metadata = read_facts(folder)
            stored = facts.pop("settings")
            state = parse_state(facts)
        except DamagedCheckpointError as error:
            problems.append(f"checkpoint '{folder}' is damaged ({error})")
            continue

        # Other settings are no damage: an older checkpoint has the same ones.
        check_settings(out, stored, settings, remove=f"'{out / RUN}'")
        if problems and distributed.is_rank0():
            print(f"regraft: {problems[0]}: resuming from '{folder}'", file=sys.stderr)
        if metadata is not None:
            state.moments = read_checkpoint(folder, metadata, dict(model.named_parameters()))
        return state

    if problems:
        raise RegraftError(
            f"{problems[0]} and no older one is whole: delete '{out / RUN}' to begin again"
        )
    return RunState()


def read_facts(folder: Path) -> tuple[dict[str, Any], Metadata | None]:
    """(state.json, metadata of the tensors) of a checkpoint, the same in all processes.

    DamagedCheckpointError when one of them is damaged.
    """
    return distributed.on_rank0(lambda: (read_state_file(folder), read_metadata(folder)))


def read_state_file(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, its keys checked; DamagedCheckpointError when it is damaged."""
    try:
        facts = read_json(folder / "state.json")
    except RegraftError as error:
        raise DamagedCheckpointError("'state.json' is not JSON") from error
    expected = {field.name for field in fields(RunState)} - {"moments"} | {"settings"}
    if wrong := sorted(expected ^ set(facts)):
        problem = "lacks" if wrong[0] in expected else "has the unknown key"
        raise DamagedCheckpointError(f"'state.json' {problem} '{wrong[0]:.60}'")
    return facts


def parse_state(facts: Mapping[str, Any]) -> RunState:
    """A state from the plain values of state.json; DamagedCheckpointError for a wrong type."""
    kinds: dict[str, Any] = {"stage": int, "step": int, "tokens": int, "fast": bool | None}
    kinds |= {"changed": list[str], "costs": dict[str, int], "watch": LitState, "trend": LossTrend}
    try:
        values = {name: convert(facts[name], kind, name) for name, kind in kinds.items()}
    except RegraftError as error:
        raise DamagedCheckpointError(f"'state.json': {error}") from error

    ledger = facts["ledger"]
    if not isinstance(ledger, list) or not all(isinstance(entry, dict) for entry in ledger):
        raise DamagedCheckpointError("'state.json': 'ledger' is no list of entries")
    return RunState(**values | {"changed": {*map(rename_older, values["changed"])}}, ledger=ledger)


def read_checkpoint(
    folder: Path, metadata: Metadata, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Read a checkpoint: the values of `named` parameters go into these, the rest is returned.

    Each process reads its own shards, however many processes wrote the checkpoint.

    Args:
        folder: the checkpoint.
        metadata: of its tensors, as checked.
        named: the model's parameters by name.

    RegraftError when the model has other shapes, or the files cannot be read.
    """
    wanted: dict[str, Tensor] = {}
    for key, facts in metadata.state_dict_metadata.items():
        kind, _, name = rename_older(key).partition("/")
        assert isinstance(facts, TensorStorageMetadata)
        if kind == "model" and name in named:
            if facts.size != named[name].shape:
                raise RegraftError(
                    f"checkpoint '{folder}' has '{name}' of shape {list(facts.size)}, the model "
                    f"{list(named[name].shape)}: give the model that the run began with"
                )
            wanted[key] = named[name].detach()
        elif name in named and facts.size == named[name].shape:
            # A moment: sharded like its parameter.
            wanted[key] = torch.zeros_like(named[name], requires_grad=False)
        else:
            # Step counts, and everything of parameters that do not exist yet (LoRA): read whole.
            wanted[key] = torch.zeros(facts.size, dtype=facts.properties.dtype)

    # The files are as they were written, so this does not fail for damage.
    try:
        with silence_dcp_warning():
            dcp.load(wanted, storage_reader=TensorReader(folder, metadata))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise RegraftError(
            f"cannot read the checkpoint '{folder}' ({format_cause(error)}): run again, or delete "
            "it to resume from the one before"
        ) from error
    read = {rename_older(key): value for key, value in wanted.items()}
    return {key: value for key, value in read.items() if key.removeprefix("model/") not in named}
