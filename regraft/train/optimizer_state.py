"""Adam's state as a file: training starts from one and leaves one, named like the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.moments import FILE, MOMENTS, STEP
from ..errors import RegraftError
from ..io.safetensors import read_tensors, save_tensors
from .fsdp import distribute_like, gather_tensor

__all__ = ["FILE", "load_optimizer_state", "save_optimizer_state"]


def load_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, file: Path
) -> None:
    """Give every trained parameter its moments and the number of steps from a file.

    RegraftError when there is no such file, or it is not of this model.

    Args:
        model: the model that is trained.
        optimizer: an AdamW over some of its parameters; its state is replaced.
        file: safetensors with `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`, as
            `regraft grow --optimizer-state` and `regraft train --keep-moments` write it.
    """
    if not file.is_file() or file.suffix != ".safetensors":
        raise RegraftError(
            f"no optimiser state at '{file}': "
            "give the .safetensors that regraft grow or train wrote"
        )
    stored = read_tensors(file)
    steps = read_step_count(stored, file)
    moments = {moment: moments_by_parameter(model, stored, moment) for moment in MOMENTS}

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for moment in MOMENTS:
                check_moment_shape(moments[moment].get(name), moment, name, parameter, file)
            # Copies: a fused weight's moments may be views of one tensor, and Adam works in place.
            state = {
                moment: distribute_like(moments[moment][name].clone(), parameter)
                for moment in MOMENTS
            }
            optimizer.state[parameter] = {**state, STEP: steps.clone()}


def read_step_count(stored: Mapping[str, Tensor], file: Path) -> Tensor:
    """The largest step count in a state, a float32 scalar; RegraftError when it has none.

    One count serves all parameters, so that Adam's bias correction is the same for all.
    """
    counts = [value for key, value in stored.items() if key.startswith(f"{STEP}/")]
    if not counts:
        raise RegraftError(
            f"'{file}' counts no steps (step/NAME): give the state that regraft grow or train wrote"
        )
    return max(count.float().reshape(()) for count in counts)


def check_moment_shape(
    value: Tensor | None, moment: str, name: str, parameter: nn.Parameter, file: Path
) -> None:
    """RegraftError when a parameter's moment is missing or has another shape than it."""
    shape = "nothing" if value is None else list(value.shape)
    if shape != list(parameter.shape):
        raise RegraftError(
            f"'{file}' holds {shape} as {moment} of '{name}' {list(parameter.shape)}: "
            "give the state of this model"
        )


def moments_by_parameter(
    model: PreTrainedModel, stored: Mapping[str, Tensor], moment: str
) -> dict[str, Tensor]:
    """One moment in float32, by the running model's parameter names."""
    values = {
        key.partition("/")[2]: value.float()
        for key, value in stored.items()
        if key.startswith(f"{moment}/")
    }
    return modeling.from_checkpoint_names(model, values)


def save_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Write `folder/optimizer.safetensors`: the state of all parameters that were trained.

    The file is written whole or not at all, by the first process; all processes must call it.
    RegraftError when it cannot be written.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    steps = max((state[STEP].reshape(()) for state in states.values()), default=torch.tensor(0.0))

    table: dict[str, Tensor] = {}
    for moment in MOMENTS:
        gathered = {name: gather_tensor(state[moment]).cpu() for name, state in states.items()}
        values = modeling.to_checkpoint_names(model, gathered)
        table |= {f"{moment}/{name}": value.contiguous().clone() for name, value in values.items()}
    table |= {f"{STEP}/{name}": steps.clone() for name in values}

    if distributed.is_rank0():
        save_tensors(folder / FILE, table)
