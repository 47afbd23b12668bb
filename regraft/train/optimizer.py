"""AdamW for a stage: parameter groups by origin, learning rates, one update, unfreezing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import RegraftError
from ..mixers.attention import Attention
from ..mixers.registry import weights
from ..modeling.modeling_regraft import RegraftForCausalLM
from .fsdp import gather_tensor
from .lora import LOW_RANK
from .stage import LAYERWISE, Stage

BETAS = (0.9, 0.95)

# By id of a parameter: where it came from ("new", "mixer" or "low rank"), whether it decays.
Origins = Mapping[int, tuple[str, bool]]


class ParameterGroup(TypedDict):
    """One of AdamW's parameter groups."""

    params: list[nn.Parameter]
    name: str  # the origin: "new", "mixer", "body" or "low rank"
    peak: float  # learning rate between warm-up and cool-down
    lr: float  # learning rate of the coming step
    weight_decay: float


def build_optimizer(groups: Iterable[ParameterGroup]) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups` or `build_groups`."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=BETAS, fused=True)


def parameter_groups(
    model: PreTrainedModel, stage: Stage, frozen: Collection[int] = ()
) -> list[ParameterGroup]:
    """AdamW's groups by origin (new, mixer, body) and by decay.

    Gains, biases, gates and decays have no weight decay. Sets `requires_grad`, so that only what
    the stage trains gets gradients.

    Args:
        model: the student; one without mixers is all body.
        stage: gives the learning rates and what learns.
        frozen: ids of parameters that do not learn.
    """
    has_mixers = isinstance(model, RegraftForCausalLM)

    # Origins are read from the mixers' own tables, never guessed from names.
    origins = parameter_origins(model) if has_mixers else {}
    if stage.rank:
        lora_ids = model.get_submodule(LOW_RANK).trainable_ids()
        origins |= dict.fromkeys(lora_ids, ("low rank", True))
    return build_groups(model.parameters(), origins, stage, has_mixers, frozen)


def build_groups(
    parameters: Iterable[nn.Parameter],
    origins: Origins,
    stage: Stage,
    has_mixers: bool,
    frozen: Collection[int] = (),
) -> list[ParameterGroup]:
    """`parameter_groups` of these parameters, whose origins are known.

    Parameters that `origins` does not name are body. RegraftError when nothing learns.
    """
    rates = peak_learning_rates(stage, has_mixers)

    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        # In the body, vectors are gains and biases: these do not decay.
        origin, decays = origins.get(id(parameter), ("body", parameter.ndim > 1))
        learns = rates[origin] > 0 and id(parameter) not in frozen
        parameter.requires_grad_(learns)
        if learns:
            groups.setdefault((origin, decays), []).append(parameter)

    if not groups:
        raise RegraftError(
            f"stage '{stage.kind}' trains nothing: all learning rates are 0, no layer has a mixer, "
            f"or learn is '{stage.learn}' and nothing is new"
        )
    return [
        {
            "params": members,
            "name": origin,
            "peak": rates[origin],
            "lr": rates[origin],
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (origin, decays), members in groups.items()
    ]


def peak_learning_rates(stage: Stage, has_mixers: bool) -> dict[str, float]:
    """Peak learning rate by origin; 0 for what stays frozen."""
    body = stage.lr_body
    if body is None:
        body = 3e-5 if has_mixers else 3e-4
    if stage.kind in LAYERWISE:  # each mixer is trained on its own: the body has no gradient
        body = 0.0
    rates = {"new": stage.lr_new, "mixer": stage.lr_mixer, "body": body}

    # With `learn` "new" or "lit", and beside low-rank additions, inherited weights stay.
    if stage.learn != "all" or stage.rank:
        rates |= {"mixer": 0.0, "body": 0.0}
    if stage.rank:
        rates["low rank"] = stage.lr_mixer
    return rates


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> None:
    """Set every group's learning rate for a step, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * stage.lr_factor(step, group.get("since"))


def apply_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """One update of the weights from clipped gradients, which are then dropped.

    Returns:
        The gradients' norm before clipping; over all processes for sharded parameters.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gather_tensor(nn.utils.clip_grad_norm_(trained, max_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)  # last, as reading the number waits for the accelerator


def unfreeze(
    model: PreTrainedModel, stage: Stage, optimizer: torch.optim.Optimizer, since: int
) -> None:
    """Let everything learn that the stage has kept frozen, from step `since` on.

    It gets groups of its own, which start without moments and with their own warm-up.
    """
    for group in parameter_groups(model, replace(stage, learn="all")):
        if group["name"] != "new":  # new weights learn already
            optimizer.add_param_group(dict(group) | {"since": since})


def projection_names(model: PreTrainedModel) -> list[str]:
    """Names of the matrices inside mixers that come from the source."""
    origins = parameter_origins(model)
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and origins.get(id(parameter), ("body",))[0] == "mixer"
    ]


def parameter_origins(model: PreTrainedModel) -> dict[int, tuple[str, bool]]:
    """By id of every parameter inside a mixer: "mixer" when inherited, else "new"; its decay."""
    found: dict[int, tuple[str, bool]] = {}
    config = model.config
    for spec, attention, slot in zip(config.mixers, config.attention, model.slots(), strict=True):
        if spec:  # None: a layer that keeps its attention
            found |= mixer_parameter_origins(slot.mixer, spec, Attention(**attention))
    return found


def mixer_parameter_origins(
    mixer: nn.Module, spec: dict[str, Any], attention: Attention
) -> dict[int, tuple[str, bool]]:
    """The same for one mixer, built from its entry `spec` in the config's `mixers`."""
    table = weights(spec, attention).items()
    return {
        id(mixer.get_parameter(name)): ("mixer" if weight.source else "new", weight.decay)
        for name, weight in table
    }
