"""Adam's state between runs: begun with from a file, kept as one, under the names that a checkpoint's weights have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..errors import RegraftError
from ..io.files import replace_file
from .fsdp import distribute_like, gather_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE = "optimizer.safetensors"


def load_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, file: Path
) -> None:
    """Give every trained parameter the moments and the number of steps in a file of `exp_avg/NAME`, `exp_avg_sq/NAME`
    and `step/NAME`, as `regraft grow --optimizer-state` writes it.

    RegraftError when there is no such file, or it is not of this model.
    """
    if not file.is_file() or file.suffix != ".safetensors":
        raise RegraftError(
            f"no optimiser state at '{file}': give the .safetensors that regraft grow or train wrote"
        )
    stored = load_file(file)
    steps = max(
        (value.float().reshape(()) for key, value in stored.items() if key.startswith("step/")),
        default=None,
    )
    if steps is None:
        raise RegraftError(
            f"'{file}' counts no steps (step/NAME): give the state that regraft grow or train wrote"
        )
    found = {moment: moments_by_parameter(model, stored, moment) for moment in MOMENTS}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in (
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ):
        name = names[id(parameter)]
        for moment in MOMENTS:
            shape = list(found[moment][name].shape) if name in found[moment] else "nothing"
            if shape != list(parameter.shape):
                raise RegraftError(
                    f"'{file}' holds {shape} as {moment} of '{name}' {list(parameter.shape)}: give the state of "
                    "this model"
                )
        optimizer.state[parameter] = {
            moment: distribute_like(found[moment][name].clone(), parameter) for moment in MOMENTS
        }
        optimizer.state[parameter]["step"] = steps.clone()


def moments_by_parameter(
    model: PreTrainedModel, stored: dict[str, Tensor], moment: str
) -> dict[str, Tensor]:
    """One moment in float32 by the running model's parameter names."""
    values = {
        key.partition("/")[2]: value.float()
        for key, value in stored.items()
        if key.startswith(f"{moment}/")
    }
    return modeling.from_checkpoint_names(model, values)


def save_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Write `folder/optimizer.safetensors`: the moments of all parameters that were trained; whole or not at all.

    The first process writes what all hold.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    table: dict[str, Tensor] = {}
    for moment in MOMENTS:
        filed = modeling.to_checkpoint_names(
            model, {name: gather_tensor(state[moment]).cpu() for name, state in held.items()}
        )
        table |= {f"{moment}/{name}": value.contiguous().clone() for name, value in filed.items()}
    steps = max((state["step"].reshape(()) for state in held.values()), default=torch.tensor(0.0))
    table |= {
        key.replace(MOMENTS[0], "step", 1): steps.clone()
        for key in table
        if key.startswith(f"{MOMENTS[0]}/")
    }
    if not distributed.is_rank0():
        return
    try:
        with replace_file(folder / FILE) as part:
            save_file(table, part)
    except (OSError, RuntimeError) as error:  # safetensors wraps a full disk in an error of its own
        raise RegraftError(
            f"cannot write '{folder / FILE}' ({error}): free some space and run again"
        ) from error
